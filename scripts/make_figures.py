"""The documentation's figures, from the demo model: `python scripts/make_figures.py [FOLDER]`.

`docs/figures/spectra.svg`: the singular values of every layer's attention tensor, mode by mode.
`docs/figures/ranks.svg`: accuracy on the demo's test part against the ranks that are kept.
`docs/figures/stacking.svg` is a drawing, made by hand.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

import tensorllm as tl
from tensorllm.compression.engine import compressed
from tensorllm.compression.spectra import MODES, attention_spectra
from tensorllm.data.demo import MODEL_DIR
from tensorllm.evaluation.evaluate import evaluate_model, make_dataset

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
GREY = "#808080"  # readable on white and on black: a picture does not know the page's colours
COLOURS = ("#4477dd", "#22aa88", "#dd8800", "#cc5588")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tensorllm",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    **{f"{name}.color": GREY for name in ("text", "xtick", "ytick")},
    **{f"axes.{name}color": GREY for name in ("edge", "label", "title")},
}

TUCKER_LAYER, R1, R3 = 1, 64, 4  # those of configs/demo/hybrid.yaml
R2 = (2, 4, 8, 12, 16, 20, 24, 28, 32)
LASER_LAYER = 3
LASER_RANKS = (1, 2, 4, 8, 16, 32, 64, 128)


def spectra_figure() -> Figure:
    """One panel per mode, one line per layer; each spectrum relative to its largest value."""
    figure = Figure(figsize=(7.6, 2.6), layout="constrained")
    panels = figure.subplots(1, len(MODES), sharey=True)
    for layer in attention_spectra(MODEL_DIR):
        for panel, (mode, name) in zip(panels, MODES.items(), strict=True):
            values = layer.spectra[name]
            places = range(1, len(values) + 1)
            relative = [value / values[0] for value in values]
            panel.plot(places, relative, color=COLOURS[layer.layer], label=f"layer {layer.layer}")
            panel.set_title(f"mode {mode + 1}: {name}, {layer.shape[mode]}", fontsize=9)
    for panel in panels:
        panel.set(xlabel="singular value", ylim=(0, 1.05))
    panels[0].set_ylabel("relative to the largest")
    panels[0].legend()
    return figure


def ranks_figure() -> Figure:
    """Accuracy after LASER of one FFN matrix, and after SharedTucker4D in both layouts."""
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    data = make_dataset("demo", split="test")

    def accuracies(edits: Iterable[tl.Compressor], layer: int) -> Iterator[float]:
        for edit in edits:
            with compressed(model, edit, [layer]):
                yield evaluate_model(model, tokenizer, data)["accuracy"]

    before = evaluate_model(model, tokenizer, data)["accuracy"]
    figure = Figure(figsize=(7.6, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    lasers = [tl.LaserSVD(rank=rank) for rank in LASER_RANKS]
    left.plot(LASER_RANKS, [*accuracies(lasers, LASER_LAYER)], "o-", color=COLOURS[0], ms=4)
    left.set_xscale("log", base=2, subs=[])
    left.set_xticks(LASER_RANKS, [str(rank) for rank in LASER_RANKS])
    left.set(xlabel="rank kept of 128", ylabel="accuracy, %", ylim=(0, 72))
    left.set_title(f"LASER: layer {LASER_LAYER}, first FFN matrix", fontsize=9)
    for layout, colour in (("paper", COLOURS[1]), ("official", COLOURS[2])):
        tuckers = [tl.SharedTucker4D(ranks=(R1, r2, R3), layout=layout) for r2 in R2]
        scores = [*accuracies(tuckers, TUCKER_LAYER)]
        right.plot(R2, scores, "o-", color=colour, ms=4, label=f"layout {layout}")
    right.set_xticks(R2)
    right.set(xlabel=f"R2 kept of 32 (R1 = {R1}, R3 = {R3})")
    right.set_title(f"SharedTucker4D: layer {TUCKER_LAYER}, attention", fontsize=9)
    right.legend()
    for panel in (left, right):
        panel.axhline(before, color=GREY, ls="--", lw=1)
        panel.text(panel.get_xlim()[0], before - 1, " original", va="top", fontsize=8)
    return figure


def main(folder: Path) -> None:
    """Write both figures."""
    with mpl.rc_context(STYLE):
        for name, draw in (("spectra", spectra_figure), ("ranks", ranks_figure)):
            path = folder / f"{name}.svg"
            draw().savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
            print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FIGURES)
