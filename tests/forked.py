"""Real processes of their own that need not import torch and transformers again: forks of a server.

A fresh interpreter takes five seconds of processor time until a command begins. Here one process
per worker of pytest imports what the commands import, and forks for each `Popen`: its child has its
own process id and session, environment, folder, standard streams and exit code, and is killed as
any other. What is about a fresh interpreter itself (what is imported, and when) needs
`subprocess`.

A second server has imported neither the Hugging Face libraries nor ours. From it come the processes
that are to do so themselves (`bare`), and those in whose environment a variable of these libraries
differs, for they read it when they are imported.
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, Self

BARE = ("torch._dynamo", "scipy.signal", "pandas", "pyarrow.dataset", "matplotlib.pyplot")
ALL = (
    *BARE,
    *("datasets", "lightning.pytorch"),
    *("tensorllm.commands.compress", "tensorllm.commands.evaluate", "tensorllm.commands.search"),
    "transformers.models.auto.modeling_auto",
)
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
        self._channel, theirs = socket.socketpair()
        self._reader = self._channel.makefile()
        (self.stdin, read), (self.stdout, out), (self.stderr, err) = (
            _stream(stdin, 0), _stream(stdout, 1), _stream(stderr, 2),
        )  # fmt: skip
        request = {"arguments": self.args, "env": env, "cwd": str(cwd or Path.cwd())}
        fds = [theirs.fileno(), *(fd for fd, _ in (read, out, err))]
        socket.send_fds(_server(bare or _differs(env)), [b"x"], fds)
        self._channel.sendall(json.dumps(request).encode() + b"\n")
        theirs.close()
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


def _stream(wanted: int | None, fd: int) -> tuple[IO[str] | None, tuple[int, bool]]:
    """Our end of a pipe, and the descriptor for the child with whether it is ours to close."""
    if wanted == subprocess.PIPE:
        read, write = os.pipe()
        ours, theirs = (write, read) if fd == 0 else (read, write)
        return os.fdopen(ours, "w" if fd == 0 else "r"), (theirs, True)
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
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno()), *(BARE if bare else ALL)],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def _serve(control: socket.socket, preload: Iterable[str]) -> None:
    """Forks for each request until the other end is closed, which kills what still runs."""
    if set(preload) >= set(ALL):
        from tensorllm_cli.volume import silence_libraries

        silence_libraries()  # as the command does before it imports them
    for name in preload:
        __import__(name)
    gc.collect()
    gc.freeze()
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    running: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([control, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            _report(running)
        if control not in ready:
            continue
        _, fds, _, _ = socket.recv_fds(control, 1, 4)
        if not fds:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
            return
        channel = socket.socket(fileno=fds[0])
        with channel.makefile() as lines:
            request = json.loads(lines.readline())
        pid = os.fork()
        if not pid:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for other in (control, channel, *running.values()):
                other.close()
            os.close(woken)
            os.close(wakes)
            _become(request, fds[1:])
        for fd in fds[1:]:
            os.close(fd)
        running[pid] = channel
        channel.sendall(f"{pid}\n".encode())


def _report(running: dict[int, socket.socket]) -> None:
    """The exit code of each child that has ended, to whoever asked for it."""
    for pid in list(running):
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            channel = running.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            with suppress(BrokenPipeError):  # nobody waits for it any more
                channel.sendall(f"{code} {usage.ru_utime + usage.ru_stime}\n".encode())
            channel.close()


def _become(request: Mapping[str, Any], streams: Sequence[int]) -> None:
    """What `python -c ...` or `python -m ...` does from its start to its end."""
    os.setsid()
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
        os.close(fd)
    out, err = os.fdopen(1, "w", 1 if os.isatty(1) else -1), os.fdopen(2, "w", 1)
    err.reconfigure(errors="backslashreplace")
    sys.stdin = sys.__stdin__ = os.fdopen(0)
    sys.stdout = sys.__stdout__ = out
    sys.stderr = sys.__stderr__ = err
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    option, *rest = request["arguments"]
    what = rest.pop(0) if option in ("-c", "-m") else option
    path = filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep))
    first = {"-c": "", "-m": request["cwd"]}.get(option, str(Path(option).parent))
    sys.path[:1] = [first, *path]  # in place of our own folder
    sys.argv = [option, *rest]
    code = 0
    try:
        if option == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        elif option != "-c":
            runpy.run_path(what, run_name="__main__")
        else:
            main = type(sys)("__main__")
            sys.modules["__main__"] = main
            exec(compile(what, "<string>", "exec"), main.__dict__)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if ended.code is not None and not isinstance(ended.code, int):
            print(ended.code, file=sys.stderr)  # noqa: T201
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for its threads
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
