"""Plots of a search: what each layer and rank is worth, accuracy against ratio, and history."""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]  # one of trials.parquet


def save_plots(folder: Path, rows: Sequence[Row], results: Mapping[str, Any]) -> list[Path]:
    """Write one picture per plot; none where matplotlib (the extra `report`) is not installed."""
    if find_spec("matplotlib") is None:
        return []
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Sums over fewer examples than all are no fair figures: trials given up are left out.
    full = [row for row in rows if row["state"] == "complete" and not row["stopped"]]
    measure = "loss" if results["objective"] == "loss" else "accuracy"
    full = [row for row in full if row[measure] is not None]
    written = []
    for name, draw in PLOTS.items() if full else ():
        figure = Figure(figsize=(6, 4), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.subplots(), full, results, measure)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=120)
        written.append(path)
    return written


def _heatmap(axes: Any, rows: Sequence[Row], results: Mapping[str, Any], measure: str) -> None:
    """The best of every layer and first rank."""
    across = next(name for name in ("R1", "R2", "rho") if rows[0].get(name) is not None)
    layers = sorted({row["layer"] for row in rows})
    values = sorted({row[across] for row in rows})
    pick = min if measure == "loss" else max
    cells = [
        [
            pick((r[measure] for r in rows if r["layer"] == i and r[across] == v), default=None)
            for v in values
        ]
        for i in layers
    ]
    shown = [[float("nan") if cell is None else cell for cell in line] for line in cells]
    image = axes.imshow(shown, aspect="auto", origin="lower", cmap="viridis")
    axes.figure.colorbar(image, ax=axes, label=f"best validation {measure}")
    axes.set_yticks(range(len(layers)), layers)
    step = max(1, len(values) // 12)
    axes.set_xticks(range(0, len(values), step), [f"{v:g}" for v in values[::step]])
    axes.set(xlabel=across, ylabel="first edited layer")


def _front(axes: Any, rows: Sequence[Row], results: Mapping[str, Any], measure: str) -> None:
    """Every trial, those that no other beats in both, and the original."""
    axes.scatter([r["ratio"] for r in rows], [r[measure] for r in rows], s=9, alpha=0.5)
    best = sorted((r["ratio"], r[measure]) for r in results["front"])
    axes.plot(*zip(*best, strict=True), "o-", color="C3", label="no trial beats these in both")
    original = results["original"]["validation"][measure]
    axes.axhline(original, color="grey", linestyle="--", label="original")
    axes.set(
        xscale="log", xlabel="ratio of the decomposed matrices", ylabel=f"validation {measure}"
    )
    axes.legend()


def _history(axes: Any, rows: Sequence[Row], results: Mapping[str, Any], measure: str) -> None:
    """Trials in the order of their numbers, and the best so far."""
    rows = sorted(rows, key=lambda row: row["number"])
    pick: Callable[..., float] = min if measure == "loss" else max
    best = [pick(r[measure] for r in rows[: n + 1]) for n in range(len(rows))]
    axes.plot([r["number"] for r in rows], [r[measure] for r in rows], ".", label="trials")
    axes.step([r["number"] for r in rows], best, where="post", label="best so far")
    axes.set(xlabel="trial", ylabel=f"validation {measure}")
    axes.legend()


PLOTS: dict[str, Callable[[Any, Sequence[Row], Mapping[str, Any], str], None]] = {
    "heatmap": _heatmap,
    "pareto": _front,
    "history": _history,
}
