"""Labels of heat maps do not touch, whatever values a search sampled."""

import random
from pathlib import Path
from typing import Any

import pytest

from tensorllm.reporting.page import heatmap
from tensorllm.reporting.page.plots_search import _short, search_pictures
from tensorllm.reporting.page.theme import Canvas

pytest.importorskip("matplotlib")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, list[str]]]:
    """Each axis whose labels were set, and its labels as they are drawn."""
    kept: list[tuple[Any, list[str]]] = []
    set_ticks = heatmap._ticks

    def watched(axis: Any, labels: Any) -> None:
        set_ticks(axis, labels)
        assert not heatmap.overlap(axis)
        kept.append((axis, [label.get_text() for label in axis.get_ticklabels()]))

    monkeypatch.setattr(heatmap, "_ticks", watched)
    return kept


@pytest.mark.parametrize(
    ("columns", "digits"), [(1, 12), (8, 1), (8, 12), (9, 1), (12, 4), (24, 12), (60, 1)]
)
def test_labels_have_room(tmp_path: Path, drawn: Any, columns: int, digits: int) -> None:
    heatmap.heatmap(
        Canvas(tmp_path),
        "plot",
        [[float(n) for n in range(columns)]] * 40,
        rows=[f"layer {n}" for n in range(40)],
        columns=[f"{0.01 + n / 97:.{digits}f}" for n in range(columns)],
        names=("a", "b"),
        title="t",
    )
    (_, rows), (_, across) = drawn
    assert rows[0] == "layer 0"
    assert across
    assert len(across) == columns or digits > 1 or columns > 8


def test_a_search_of_sampled_values(tmp_path: Path, drawn: Any) -> None:
    noise = random.Random(0)
    rows = [
        {
            "state": "complete",
            "stopped": False,
            "accuracy": noise.random(),
            "loss": noise.random(),
            "layer": noise.randrange(12),
            "rho": 0.01 + 0.02 * n + noise.random() / 100,
            "ratio": 1 + noise.random(),
            "number": n,
        }
        for n in range(60)
    ]
    original = {"validation": {"accuracy": 0.5, "loss": 0.5}}
    space = {"choices": {"layer": list(range(12)), "matrices": ["in"], "rho": [0.01, 1.2]}}
    found = {"metric": "accuracy", "original": original, "space": space}
    search_pictures(Canvas(tmp_path), rows, found)
    assert len(drawn[1][1]) == 8


def test_values_are_told_apart_in_few_digits() -> None:
    assert _short([0.0101234, 0.030223, 0.5]) == ["0.01", "0.03", "0.5"]
    assert _short([0.01012, 0.01013]) == ["0.01012", "0.01013"]
    assert _short([16, 2048, 1.0]) == ["16", "2048", "1"]
