"""Small real runs of every kind that `tensorllm report` shows."""

import json
from pathlib import Path

import pytest

from tensorllm.commands.bench import bench
from tensorllm.requests.others import BenchRequest
from tensorllm_cli.app import main


def run(*arguments: object) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def make_runs(folder: Path) -> dict[str, Path]:
    """A compressed demo model, its evaluation, its speed, and a search; by their kinds."""
    runs = {name: folder / name for name in ("compressed", "evaluated", "searched")}
    demo = ("--model", "demo")
    compress = ("compress", *demo, "--mode", "hybrid", "--format", "factored", "--limit", 20)
    assert run(*compress, "--out", runs["compressed"]) == 0
    evaluate = ("evaluate", *demo, "--dataset", "demo", "--limit", 120)
    assert run(*evaluate, "--compressed", runs["compressed"], "--out", runs["evaluated"]) == 0
    runs["benched"] = folder / "bench.json"
    asked = BenchRequest(
        model=runs["compressed"], prompt_tokens=24, new_tokens=4, repeats=2, peak=False
    )
    runs["benched"].write_text(json.dumps(bench(asked).to_json()))
    search = ("search-ranks", *demo, "--mode", "shared-tucker", "--limit", 40, "--trials", 5)
    assert run(*search, "--r1", "32,64", "--full", "--study", runs["searched"]) == 0
    return runs
