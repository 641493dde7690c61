"""Marks of measured numbers must not show: Markdown takes some comments for more than that."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_line_begins_with_a_mark(page: Path) -> None:
    """Such a line is an HTML block: the paragraph ends before it."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert not re.findall(r"^ *<!-- n:.*", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_mark_splits_the_cell_of_a_table(page: Path) -> None:
    assert not re.findall(r"<!-- n:[^>]*\|[^>]*-->", page.read_text())
