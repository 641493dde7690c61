"""Ctrl-C at random moments, in real processes: exit code 130, one line, and the work goes on."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from cli_runs import COMMAND, environment, piped

SEARCH = ("--layers", "2-3", "--r1", "32,64", "--r2", "8,16", "--r3", "2,4", "--full")
COMMANDS: dict[str, tuple[str, ...]] = {
    "compress": ("--mode", "shared-tucker", "--layers", "all", "--limit", "400", "--out"),
    "evaluate": ("--dataset", "demo", "--limit", "1500", "--out"),
    "search-ranks": (*SEARCH, "--limit", "300", "--study"),
}


def interrupted(arguments: list[str], after: float) -> tuple[int, str]:
    """Exit code and standard error of a run whose terminal sends Ctrl-C after so many seconds."""
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group of its own, all of which Ctrl-C reaches
    )
    time.sleep(after)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


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
    started = time.monotonic()
    assert piped(*command, tmp_path / "whole").returncode == 0
    whole = time.monotonic() - started
    begin, end = max(whole / 4, min(1.5, whole / 2)), 0.9 * whole
    moments = random.Random(name)
    stopped = 0
    for _ in range(8):
        if stopped == 2 or _done(name, tmp_path / "out"):
            break
        after = moments.uniform(begin, end)
        code, err = interrupted([*command, str(tmp_path / "out")], after)
        if code == 0 and not stopped:  # the machine is faster than it was
            end = 0.7 * after
            begin = min(begin, end / 2)
            shutil.rmtree(tmp_path / "out")
        elif code == 0:
            break
        elif code == -signal.SIGINT and not err:  # it is slower: Python itself was starting
            begin = after
        else:
            assert code == 130, err
            assert err.count("\n") == 1, err
            assert err.startswith("error: interrupted; run the same command again")
            stopped += 1
    if not _done(name, tmp_path / "out"):
        again = piped(*command, tmp_path / "out")
        assert again.returncode == 0, again.stderr
    assert stopped > 0
    assert facts(name, tmp_path / "out") == facts(name, tmp_path / "whole")


def _done(name: str, folder: Path) -> bool:
    return (folder / ("tensorllm.json" if name == "compress" else "results.json")).exists()


def test_what_is_not_kept_is_told() -> None:
    code, err = interrupted(["search-ranks", "--model", "demo", *SEARCH], 2.0)
    assert code == 130, err
    assert err == (
        "error: interrupted; nothing was kept: with --study FOLDER the same command would go on\n"
    )
