"""Ctrl-C at random moments, in real processes: exit code 130, one line, and the work goes on."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import forked
import pytest
from cli_runs import COMMAND, environment, piped

SEARCH = ("--layers", "2-3", "--r1", "32,64", "--r2", "8,16", "--r3", "2,4", "--full")
COMMANDS: dict[str, tuple[str, ...]] = {
    "compress": ("--mode", "shared-tucker", "--layers", "all", "--limit", "400", "--out"),
    "evaluate": ("--dataset", "demo", "--limit", "1500", "--out"),
    "search-ranks": (*SEARCH, "--limit", "300", "--study"),
}


def interrupted(process: Any, after: float) -> tuple[int, str]:
    """Exit code and standard error of a process that gets Ctrl-C after so much processor time.

    Processor time, for on a busy machine it tells better than a clock how far the run has come.
    """
    while process.poll() is None and spent(process.pid) < after:
        time.sleep(0.01)
    if process.poll() is None:
        with suppress(ProcessLookupError):  # it has ended since
            os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=240)
    return process.returncode, err


def started(arguments: list[str]) -> forked.Popen:
    """In a group of its own, all of which Ctrl-C reaches."""
    pipe = subprocess.PIPE
    return forked.Popen([*COMMAND, *arguments], env=environment(), stdout=pipe, stderr=pipe)


def started_anew(arguments: list[str]) -> subprocess.Popen[str]:
    """The same in a fresh interpreter, which imports for the first seconds."""
    return subprocess.Popen(
        [sys.executable, *COMMAND, *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def spent(pid: int) -> float:
    """Seconds of processor time that a process has used; more than all where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return math.inf
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def facts(name: str, folder: Path) -> Any:
    """What must not depend on interruptions."""
    if name == "compress":
        return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]
    results = json.loads((folder / "results.json").read_text())
    if name == "evaluate":
        return results["metrics"], results["intervals"]
    return results["winner"]["test"], results["trials"]["all"], results["winner"]["ranks"]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_at_any_moment(name: str, tmp_path: Path) -> None:
    command = [name, "--model", "demo", *COMMANDS[name]]
    undisturbed = started([*command, str(tmp_path / "whole")])
    _, err = undisturbed.communicate()
    assert undisturbed.returncode == 0, err
    begin, end = undisturbed.seconds / 4, 0.9 * undisturbed.seconds
    moments = random.Random(name)
    stopped = 0
    for _ in range(8):
        after = moments.uniform(begin, end)
        code, err = interrupted(started([*command, str(tmp_path / "out")]), after)
        done = _done(name, tmp_path / "out")
        if not done:
            assert code == 130, err
            assert err.count("\n") == 1, err
            assert err.startswith("error: interrupted; run the same command again")
            stopped += 1
        elif not stopped:  # too late: this run took less than the undisturbed one
            end *= 0.7
            begin = min(begin, end / 2)
            shutil.rmtree(tmp_path / "out")
        if stopped == 2 or (stopped and done):
            break
    if not _done(name, tmp_path / "out"):
        again = piped(*command, tmp_path / "out")
        assert again.returncode == 0, again.stderr
    assert stopped > 0
    assert facts(name, tmp_path / "out") == facts(name, tmp_path / "whole")


def _done(name: str, folder: Path) -> bool:
    return (folder / ("tensorllm.json" if name == "compress" else "results.json")).exists()


def test_what_is_not_kept_is_told() -> None:
    code, err = interrupted(started_anew(["search-ranks", "--model", "demo", *SEARCH]), 2.0)
    assert code == 130, err
    assert err == (
        "error: interrupted; nothing was kept: with --study FOLDER the same command would go on\n"
    )


def test_ctrl_c_inside_code_from_a_string(tmp_path: Path) -> None:
    """Dataclasses run such code when they are made: Python would end by the signal, not by 130."""
    press = "import os, signal; os.kill(os.getpid(), signal.SIGINT); [None for _ in range(9)]"
    (tmp_path / "pressing.py").write_text(f"exec({press!r})\n")
    process = subprocess.run(
        [sys.executable, *COMMAND, "inspect", "--model", "demo", "--plugin", "pressing"],
        env=environment(PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 130, process.stderr
    assert process.stderr.startswith("error: interrupted; ")
