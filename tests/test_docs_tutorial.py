"""docs/tutorial.md holds: its commands, run in order, print what the page says they print."""

import re
from pathlib import Path

import pytest
from docs_blocks import ROOT, blocks, commands

from tensorllm_cli.app import main

PAGE = ROOT / "docs" / "tutorial.md"
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


@pytest.mark.slow
def test_the_tutorial_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for block in blocks(PAGE.read_text(), "console"):
        arguments, want = shown(block.text)
        with pytest.raises(SystemExit) as end:
            main(arguments)
        printed = capsys.readouterr()
        assert end.value.code == 0, printed.err
        assert normal(want) == normal(printed.out), arguments


def test_lines_are_compared_without_seconds_and_spacing() -> None:
    row = " layers.1.qkvo   128×32×4×4   64,16,4   0.5115   {} \n ──── \n\n took {} s, kept 0.25"
    assert normal(row.format("0.01", "1.5")) == normal(row.format("0.07", "22.25"))
    assert normal("kept 0.25 of it") != normal("kept 0.26 of it")
