"""Real processes of their own that need not import torch and transformers again: forks of a server.

A fresh interpreter takes five seconds of processor time until a command begins. Here one process
per worker of pytest imports what the commands import, and forks for each `Popen`: its child has its
own process id and group, environment, folder, standard streams and exit code, and is killed as
any other. What is about a fresh interpreter itself (what is imported, and when) needs
`subprocess`.

A second server has imported neither the Hugging Face libraries nor ours. From it come the processes
that are to do so themselves (`bare`), and those in whose environment a variable of these libraries
differs, for they read it when they are imported.
"""

import atexit
import json
import multiprocessing
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Self

import pytest
import torch

SERVER = Path(__file__).with_name("fork_server.py")
BARE = ("torch._dynamo", "scipy.signal", "pandas", "pyarrow.dataset", "matplotlib.pyplot")
ALL = (
    *BARE,
    *("datasets", "lightning.pytorch"),
    *("tensorllm.commands.compress", "tensorllm.commands.evaluate", "tensorllm.commands.search"),
    "transformers.models.auto.modeling_auto",
)
KNOWN = ("env", "cwd", "stdin", "stdout", "stderr")  # options that `Popen` has, too
READ_AT_IMPORT = ("HF_", "HUGGING", "TRANSFORMERS_")


class Popen:
    """As `subprocess.Popen` of this Python with text streams.

    Args:
        arguments: of the interpreter: they begin with -c, -m or a file.
        bare: with neither transformers nor tensorllm imported yet.

    Attributes:
        seconds: of processor time, of the process and those it waited for; once it has ended.
    """

    def __init__(
        self,
        arguments: Sequence[Any],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        bare: bool = False,
    ) -> None:
        self.args = [str(argument) for argument in arguments]
        self.returncode: int | None = None
        self.seconds = 0.0
        env = dict(os.environ if env is None else env)
        self._channel, remote = socket.socketpair()
        self._reader = self._channel.makefile()
        (self.stdin, read), (self.stdout, out), (self.stderr, err) = (
            _stream(stdin, 0), _stream(stdout, 1), _stream(stderr, 2),
        )  # fmt: skip
        request = {"arguments": self.args, "env": env, "cwd": str(cwd or Path.cwd())}
        fds = [remote.fileno(), *(fd for fd, _ in (read, out, err))]
        socket.send_fds(_server(bare or _differs(env)), [b"x"], fds)
        self._channel.sendall(json.dumps(request).encode() + b"\n")
        remote.close()
        for fd, ours in (read, out, err):
            if ours:
                os.close(fd)
        self.pid = int(self._reader.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream:
                stream.close()
        self.wait()

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        if self._ended(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has ended since
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it writes until it ends, to standard output and to standard error."""
        ends = None if timeout is None else time.monotonic() + timeout
        streams = [stream for stream in (self.stdout, self.stderr) if stream]
        said: dict[Any, bytes] = dict.fromkeys(streams, b"")
        while streams:
            left = None if ends is None else max(0, ends - time.monotonic())
            ready, _, _ = select.select(streams, [], [], left)
            if not ready:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            for stream in ready:
                chunk = os.read(stream.fileno(), 65536)
                said[stream] += chunk
                if not chunk:
                    streams.remove(stream)
        self.wait(None if ends is None else max(0, ends - time.monotonic()))
        out, err = (
            said[stream].decode() if stream else "" for stream in (self.stdout, self.stderr)
        )
        for stream in said:
            stream.close()
        return out, err

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._channel], [], [], timeout)[0]:
            code, seconds = self._reader.readline().split()
            self.returncode, self.seconds = int(code), float(seconds)
            self._reader.close()
            self._channel.close()
        return self.returncode


def run(
    arguments: Sequence[Any],
    *,
    timeout: float = 240,
    check: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` of this Python with its output captured as text."""
    pipe = subprocess.PIPE
    process = Popen(arguments, stdout=pipe, stderr=pipe, **options)
    try:
        out, err = process.communicate(timeout)
    except BaseException:
        process.kill()
        raise
    assert process.returncode is not None
    done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


class _Popen(subprocess.Popen[str]):
    """A fork where the command is this Python, else what `subprocess` makes of it."""

    def __new__(cls, words: Sequence[Any], **options: Any) -> Any:
        if words[0] != sys.executable:
            return subprocess.Popen(words, **options)
        known = {name: options[name] for name in KNOWN if name in options}
        return Popen(words[1:], **known)


def _run(words: Sequence[Any], **options: Any) -> subprocess.CompletedProcess[str]:
    """The same for `subprocess.run`; what was not to be captured goes to standard error."""
    if words[0] != sys.executable:
        return subprocess.run(words, check=options.pop("check", False), **options)
    captured = options.get("capture_output", False) or "stderr" in options
    known = {name: options[name] for name in ("env", "cwd", "check") if name in options}
    done = run(words[1:], **known)
    if not captured:
        sys.stderr.write(done.stderr)
    return done


def stand_in() -> ModuleType:
    """For the module `subprocess` in code that starts this Python again and reads its text."""
    module = ModuleType("subprocess")
    vars(module).update(vars(subprocess), run=_run, Popen=_Popen)
    return module


@cache
def context() -> Any:
    """Of multiprocessing: children that find everything imported."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(list(ALL))
    return made


def spawn_off_a_server(patch: pytest.MonkeyPatch) -> None:
    """Until the patch is undone, processes are started by `context` where "spawn" is asked for.

    They find the same state, that of a process in which only libraries and tensorllm were imported.
    """
    original = multiprocessing.get_context

    def get_context(method: str | None = None) -> Any:
        return context() if method == "spawn" else original(method)

    for module in (multiprocessing, torch.multiprocessing):
        patch.setattr(module, "get_context", get_context)


def _stream(wanted: int | None, fd: int) -> tuple[IO[str] | None, tuple[int, bool]]:
    """Our end of a pipe, and the descriptor for the child with whether it is ours to close."""
    if wanted == subprocess.PIPE:
        read, write = os.pipe()
        ours, remote = (write, read) if fd == 0 else (read, write)
        return os.fdopen(ours, "w" if fd == 0 else "r"), (remote, True)
    if wanted == subprocess.DEVNULL:
        return None, (os.open(os.devnull, os.O_RDWR), True)
    return None, (fd if wanted is None else wanted, False)


def _differs(env: Mapping[str, str]) -> bool:
    """Whether the libraries of Hugging Face would read another setting than in this process."""
    names = {name for name in {*env, *os.environ} if name.startswith(READ_AT_IMPORT)}
    return any(env.get(name) != os.environ.get(name) for name in names)


@cache
def _server(bare: bool) -> socket.socket:
    """The way to a server of this worker, which ends with the worker."""
    ours, remote = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, SERVER, str(remote.fileno()), *(BARE if bare else ALL)],
        pass_fds=[remote.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "TORCH_LOGS": "-all"},  # as the command has it before it imports torch
        process_group=0,  # Ctrl-C at a terminal is for pytest
    )
    remote.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours
