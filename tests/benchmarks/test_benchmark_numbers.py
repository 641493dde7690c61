"""What the pages quote is what docs/results/ holds, and a number that differs is found."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import forked
import pytest
from repository import ROOT


def fill(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    script = root / "scripts" / "fill_numbers.py"
    path = str(root / "benchmarks")  # as the Makefile has it
    return forked.run([script, *options], env=os.environ | {"PYTHONPATH": path})


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A repository of its own: the scripts, what they import, and one page."""
    for folder in ("scripts", "benchmarks", "docs/results"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("site"))
    (tmp_path / "README.md").write_text("")
    return tmp_path


def test_the_pages_quote_the_results():
    found = fill(ROOT, "--check")
    assert found.returncode == 0, found.stdout + found.stderr


def test_numbers_and_tables_are_filled(copy: Path):
    made = json.loads((ROOT / "docs/results/decompose.json").read_text())["cpu"]
    one = {"ours": 2.0, "unit": "s", "peer": 9.0, "peer_name": "other", "times": 4.5, "floor": None}
    slow = one | {"wanted": 5.0}
    results = {"cpu": made | {"comparisons": {"slow": slow, "fast": slow | {"wanted": 4}}}}
    (copy / "docs/results/toy.json").write_text(json.dumps(results))
    page = copy / "docs" / "page.md"
    page.write_text(
        "a <!-- n:toy/cpu/slow/times;.2f -->9<!-- /n --> b <!-- n:toy/cpu/comparisons/slow/peer -->"
        "<!-- /n -->\n```\n<!-- n:none/x -->left alone<!-- /n -->\n```\n"
        "`<!-- n:none/x -->`left alone, too<!-- /n -->\n\n"
        "<!-- table:comparisons toy/cpu -->\nold\n<!-- /table -->\n"
        "<!-- table:comparisons toy/cpu/fast decompose/cpu/RoBERTa -->\n<!-- /table -->\n"
    )
    assert fill(copy, "--check").returncode == 1
    assert fill(copy).returncode == 0
    text = page.read_text()
    assert "a <!-- n:toy/cpu/slow/times;.2f -->4.50<!-- /n --> b" in text
    assert "peer -->9<!-- /n -->" in text
    assert text.count("left alone") == 2
    assert "| slow | 2 s | other 9 s | 4.5 | 5 (missed) |\n" in text
    assert "| fast | 2 s | other 9 s | 4.5 | 4 |\n" in text
    assert "| toy: fast | 2 s | other 9 s | 4.5 | 4 |  |\n| decompose: RoBERTa |" in text
    assert "old" not in text
    assert fill(copy, "--check").returncode == 0
    assert fill(copy).returncode == 0
    assert page.read_text() == text  # nothing moves the second time


@pytest.mark.parametrize(
    ("marker", "told"),
    [
        ("<!-- n:nowhere/x -->1<!-- /n -->", "no docs/results/nowhere.json"),
        ("<!-- n:decompose/cpu/GPTJ/times -->1<!-- /n -->", "no 'GPTJ' among"),
        ("<!-- table:tabel x -->\n<!-- /table -->", "no table 'tabel' among"),
    ],
)
def test_a_marker_that_leads_nowhere_is_named(copy: Path, marker: str, told: str):
    (copy / "docs" / "page.md").write_text(f"{marker}\n")
    found = fill(copy, "--check")
    assert found.returncode == 1
    assert "docs/page.md" in found.stderr
    assert told in found.stderr
