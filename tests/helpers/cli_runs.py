"""Running the command as a user does: a process of its own, piped or in a terminal."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import forked

PROGRESS = re.compile(r"^(?:\d+ of \d+|\d+ %), .*\n", re.MULTILINE)
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COMMAND = ["-m", "tensorllm"]  # behind the name of a Python


def environment(**more: str) -> dict[str, str]:
    """A plain terminal of 80 columns; no colours forced upon it."""
    kept = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "GITHUB_ACTIONS")}
    return {**kept, "COLUMNS": "80", "TERM": "xterm-256color", "HF_HUB_OFFLINE": "1", **more}


def without_progress(stderr: str) -> str:
    """Standard error without the lines that a run of more than half a minute prints."""
    return PROGRESS.sub("", stderr)


def piped(
    *arguments: Any, cwd: Path | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    """The command with its output piped."""
    return forked.run([*COMMAND, *arguments], env=environment(**more), cwd=cwd)


def piped_anew(*arguments: Any, **more: str) -> subprocess.CompletedProcess[str]:
    """The same in a fresh interpreter, whose imports may have something to say."""
    return subprocess.run(
        [sys.executable, *COMMAND, *map(str, arguments)],
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=240,
    )


def in_terminal(*arguments: Any, extra: Mapping[str, str] | None = None) -> tuple[int, str]:
    """The exit code and all that a terminal of 80 columns was sent."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = forked.Popen(
        [*COMMAND, *arguments],
        env=environment(**(extra or {})),
        stdin=follower,
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    chunks = []
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(leader)
    return process.wait(), b"".join(chunks).decode(errors="replace")


def lines_of(sent: str) -> list[str]:
    """The lines as they stood on the screen, redrawn ones apart."""
    return re.split(r"[\r\n]+", CONTROL.sub("", sent))
