"""The process that forks for `forked.Popen`: it imports the modules named, then serves requests.

Only what a fresh interpreter has is imported beside that.
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


def serve(control: socket.socket, preload: Sequence[str]) -> None:
    """Forks for each request until the other end is closed, which kills what still runs."""
    ours = any(name.startswith("tensorllm") for name in preload)
    gc.disable()
    os.fsync = lambda fd: None  # as in conftest.py
    if ours:
        from tensorllm_cli.volume import silence_libraries

        silence_libraries()  # as the command does before it imports them
    for name in preload:
        __import__(name)
    gc.freeze()
    gc.enable()
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
    os.setpgid(0, 0)
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
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
