"""Every benchmark runs, at tiny sizes, and writes what the pages read."""

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
import torch
from repository import ROOT

from tensorllm.compressors.base import COMPRESSORS

FOLDER = ROOT / "benchmarks"
OUTSIDE = {"llama_cpp", "vllm_serving"}  # need other programs, in environments of their own
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if path.stem not in OUTSIDE)
# Real rows and a trained model.
NEEDS_DATA = {
    "ablations",
    "bytes",
    "energy",
    "evaluate",
    "finetune",
    "quantised",
    "whole_model_real",
}


@pytest.fixture(autouse=True)
def state() -> Iterator[None]:
    """Threads as they were, and no strategies of a benchmark's own left behind."""
    threads, known = torch.get_num_threads(), dict(COMPRESSORS._entries)
    yield
    torch.set_num_threads(threads)
    COMPRESSORS._entries = known


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("default")
def test_a_benchmark_runs(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
):
    if script.stem in NEEDS_DATA:
        request.getfixturevalue("tinystories")
    monkeypatch.setitem(sys.modules, "subprocess", forked.stand_in())  # for their own processes
    monkeypatch.setattr("tensorllm.commands.bench.subprocess", forked.stand_in())
    out = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", [str(script), "--quick", "--out", str(out)])
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    parts = json.loads(out.read_text())
    assert parts
    for part in parts.values():
        assert {"date", "commit", "command", "hardware", "versions", "comparisons"} <= part.keys()
        assert "--quick" in part["command"]
        for one in part["comparisons"].values():
            assert one["ours"] > 0
            if one["peer"] is not None:
                better = one["ours"] / one["peer"] if one["more_is_better"] else None
                assert one["times"] == (better or one["peer"] / one["ours"])


@pytest.mark.parametrize("given", [["--shared", "nowhere"], []])
def test_real_data_that_is_missing_is_named(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TENSORLLM_SHARED", str(tmp_path))
    results = runpy.run_path(str(FOLDER / "support" / "results.py"))
    args = results["parser"]("doc").parse_args(given)
    assert args.shared == (Path("nowhere") if given else tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(SystemExit, match=f"no models/some in {args.shared}; give its folder by"):
        results["real"](args, "models/some")
    if not given:
        assert results["real"](args, "data") == tmp_path / "data"
