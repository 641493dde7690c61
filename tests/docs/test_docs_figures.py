"""scripts/make_figures.py draws what the demo model is; its pictures are in docs/figures."""

import runpy
from typing import Any

import pytest
from docs_blocks import PAGES, ROOT

from tensorllm.compression.spectra import attention_spectra
from tensorllm.data.demo import MODEL_DIR

FIGURES = ROOT / "docs" / "figures"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "make_figures.py"))


def test_spectra_are_those_of_the_model(script: dict[str, Any]) -> None:
    panels = script["spectra_figure"]().axes
    for layer in attention_spectra(MODEL_DIR):
        for panel, (name, values) in zip(panels, layer.spectra.items(), strict=True):
            line = panel.get_lines()[layer.layer]
            assert name in panel.get_title()
            assert list(line.get_ydata()) == pytest.approx([v / values[0] for v in values])


@pytest.mark.slow
def test_accuracies_are_those_of_the_documentation(script: dict[str, Any]) -> None:
    settings = script["ranks_figure"].__globals__
    settings.update(LASER_RANKS=(1,), R2=(16,))
    left, right = script["ranks_figure"]().axes
    (laser, original), (paper, official, _) = left.get_lines(), right.get_lines()
    drawn = [float(line.get_ydata()[0]) for line in (original, laser, paper, official)]
    assert drawn == pytest.approx([28.5, 62.5, 46.4, 47.5], abs=0.1)  # docs/layouts.md, index.md


def test_every_figure_is_shown_and_small() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for figure in FIGURES.iterdir():
        assert f"figures/{figure.name}" in text
        assert figure.stat().st_size < 100_000  # one of 21 panels has the most
