"""The folder of results, whatever ends a run half-way."""

import errno
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from random_predictions import rows as random_rows

from tensorllm.errors import UserError
from tensorllm.evaluation.results import ResultsFolder, read_results


def test_a_disk_that_is_full_at_the_start_costs_no_finished_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A run that goes on must not empty the note by which it knows its own journal."""
    rows = ResultsFolder(tmp_path / "out", "run").journal("after") / "rows.jsonl"
    rows.parent.mkdir()
    rows.write_text("{}")

    def full(path: Path, *text: Any, **how: Any) -> None:
        path.open("w").close()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, suppress(UserError):
        patch.setattr(Path, "write_text", full)
        ResultsFolder(tmp_path / "out", "run")
    ResultsFolder(tmp_path / "out", "run")
    assert rows.is_file()
    ResultsFolder(tmp_path / "out", "another run")
    assert not rows.exists()


def test_a_run_that_is_killed_while_it_replaces_results_leaves_whole_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rows, target = random_rows(3), tmp_path / "out"
    ResultsFolder(target, "old").finish({"of": "old"}, {"predictions.parquet": rows})

    def killed(folder: Path, **how: Any) -> None:
        if (folder / "results.json").exists() and folder.parent == tmp_path:
            (folder / "results.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        new = ResultsFolder(target, "new", overwrite=True)
        new.finish({"of": "new"}, {"predictions.parquet": rows})
    assert read_results(target)[0]["of"] == "new"
