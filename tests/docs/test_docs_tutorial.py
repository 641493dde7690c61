"""docs/tutorial.md holds: its commands, run in order, print what the page says they print."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from docs_blocks import ROOT, blocks, commands

from tensorllm.shown import SHOWN
from tensorllm_cli.app import main

PAGE = ROOT / "docs" / "tutorial.md"
RESULTS = ROOT / "docs" / "results" / "first_contact.json"
REAL = "## A real model"  # from here on a model that has to be fetched
FACTS = "qa_wikidata.jsonl"  # of the real data, in place of the hub
NUMBER = re.compile(r"\d+(?:\.\d+)?")
SECONDS = re.compile(r"(?<=\s)\d+\.\d\d$|\d+\.\d+(?= s\b)")  # a table's last column, or said


def normal(text: str) -> list[str]:
    """The lines that say something, without their spacing and without seconds."""
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return [SECONDS.sub("-", line) for line in lines if line.strip(" ─")]


def shown(block: str) -> tuple[list[str], str]:
    """The arguments of a block's command, and the output below it."""
    command, _, output = block.replace("\\\n", " ").partition("\n")
    (arguments,) = commands(command)
    return arguments, output


def half(which: int) -> list[tuple[list[str], str]]:
    """Commands and outputs of the page's half: 0, the demo's; 1, the real model's."""
    text = PAGE.read_text().split(f"\n{REAL}\n")[which]
    found = [block.text for block in blocks(text, "console") if commands(block.text)]
    return [shown(block) for block in found]


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    printed = capsys.readouterr()
    assert end.value.code == 0, printed.err
    return printed.out


@pytest.mark.slow
def test_the_tutorial_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for arguments, want in half(0):
        assert normal(want) == normal(run(arguments, capsys)), arguments


@pytest.mark.slow
def test_the_real_half_prints_what_it_says(
    shared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Minutes, where the folder that the page fetches is among the real models."""
    model = shared_dir / "models" / "smollm2"
    if not model.is_dir():
        pytest.skip(f"no {model}: make it by scripts/fetch_small_model.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    Path("smollm2").symlink_to(model)
    for arguments, want in half(1):
        file = (
            [] if arguments[0] == "compress" else ["--data-file", str(shared_dir / "data" / FACTS)]
        )
        got = run([*arguments, *file], capsys)
        assert without_figures(want) == without_figures(got)


def without_figures(text: str) -> str:
    """Nor is a dtype's width kept: a processor without bfloat16 computes in float32."""
    return NUMBER.sub("#", " ".join(normal(text))).replace("bfloat#", "float#")


def test_the_real_half_is_what_was_recorded() -> None:
    """Its commands are the benchmark's, its figures those of docs/results/first_contact.json."""
    found = {name: json.loads(RESULTS.read_text())[name] for name in ("laser", "hybrid")}
    halves = half(1)
    assert len(halves) == 2 * len(found)
    for (compress, sizes), (evaluate, scores), (name, part) in zip(
        halves[::2], halves[1::2], found.items(), strict=True
    ):
        assert set(part["edit"].split()) <= set(compress)
        assert compress[compress.index("--out") + 1] == evaluate[evaluate.index("--compressed") + 1]
        assert int(evaluate[evaluate.index("--limit") + 1]) == part["scores"]["examples"]
        for site in part["report"]["sites"]:
            assert f"{site['relative_error']:.4f}" in sizes
        for ratio in part["report"]["ratios"].values():
            assert f"{ratio:.3f}" in sizes, name
        now, before = part["scores"]["metrics"], part["scores"]["before"]["metrics"]
        rows = {line.split("  ")[0]: line for line in normal_columns(scores)}
        for metric, value in now.items():
            of = SHOWN[metric]
            assert of.exact(before[metric]) in rows[of.title], (name, of.title)
            assert of.exact(value) in rows[of.title]
        test = part["scores"]["comparison"]
        assert f"wrong to right {test['wrong_to_right']}, right" in scores
        low, high = test["accuracy"]["interval"]
        assert f"{low:.2f}…{high:.2f}" in rows[SHOWN["accuracy"].title]


def normal_columns(text: str) -> list[str]:
    """Lines, with two spaces between columns."""
    return [re.sub(r" {2,}", "  ", line.strip()) for line in text.split("\n")]


def test_lines_are_compared_without_seconds_and_spacing() -> None:
    row = " layers.1.qkvo   128×32×4×4   64,16,4   0.5115   {} \n ──── \n\n took {} s, kept 0.25"
    assert normal(row.format("0.01", "1.5")) == normal(row.format("0.07", "22.25"))
    assert normal("kept 0.25 of it") != normal("kept 0.26 of it")
