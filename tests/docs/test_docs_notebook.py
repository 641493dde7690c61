"""docs/notebooks/demo.ipynb runs from top to bottom, and its stored results are what it prints."""

import re
from itertools import zip_longest
from pathlib import Path
from typing import Any

import nbformat
import pytest
from docs_blocks import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "docs" / "notebooks" / "demo.ipynb"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
NEAR = 0.15  # the last digit of what is printed may differ between machines


def texts(cell: Any) -> str:
    """What a code cell printed and returned; warnings left out."""
    printed = [o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout"]
    returned = [o.data["text/plain"] for o in cell.outputs if "data" in o]
    return "".join(printed) + "".join(returned)


def assert_same(got: str, want: str) -> None:
    """The same words, and numbers that are near."""
    assert NUMBER.sub("#", got) == NUMBER.sub("#", want)
    for ours, stored in zip_longest(NUMBER.findall(got), NUMBER.findall(want)):
        assert abs(float(ours) - float(stored)) <= NEAR


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of Jupyter's own machinery, not of ours
def test_the_notebook_runs_and_says_what_is_stored(tmp_path: Path) -> None:
    stored = nbformat.read(NOTEBOOK, as_version=4)
    fresh = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(fresh, timeout=240, resources={"metadata": {"path": tmp_path}}).execute()
    for got, want in zip(fresh.cells, stored.cells, strict=True):
        if got.cell_type == "code":
            assert_same(texts(got), texts(want))


def test_every_code_cell_was_run() -> None:
    """A cell without a number was edited and not run: jupyter execute --inplace NOTEBOOK."""
    cells = [c for c in nbformat.read(NOTEBOOK, as_version=4).cells if c.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


def test_other_numbers_are_not_the_same() -> None:
    assert_same("accuracy 71.5 %", "accuracy 71.4 %")
    with pytest.raises(AssertionError):
        assert_same("accuracy 71.5 %", "accuracy 70.5 %")
