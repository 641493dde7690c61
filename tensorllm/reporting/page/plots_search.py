"""Plots of a search: scores by layer and rank, accuracy against ratio, and history."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from tensorllm.reporting.page.heatmap import heatmap
from tensorllm.reporting.page.theme import Canvas, PagePicture, colour
from tensorllm.shown import SHOWN

Row = Mapping[str, Any]  # of trials.parquet
COLUMNS = 8  # the most that have room for their numbers


def search_pictures(
    canvas: Canvas, rows: Sequence[Row], results: Mapping[str, Any], prefix: str = ""
) -> list[PagePicture]:
    """The plots of a study; empty if no trial was examined in full."""
    # Scores over only some of the examples do not compare: pruned trials are left out.
    full = [r for r in rows if r["state"] == "complete" and not r["stopped"]]
    measure = results["metric"]
    if len({r["accuracy"] for r in full}) < 2:  # all equal, or running text: accuracy shows nothing
        measure = "loss"
    full = [r for r in full if r[measure] is not None]
    if not full:
        return []
    across = _across(results["space"]["choices"])
    return [
        _layers_and_values(canvas, full, across, measure, f"{prefix}heatmap"),
        _front(canvas, full, results, measure, f"{prefix}pareto"),
        _history(canvas, full, results, measure, f"{prefix}history"),
    ]


def _across(choices: Mapping[str, Sequence[Any]]) -> str:
    """The dimension to draw against the layers: the first numeric one, or else the first."""
    own = [name for name in choices if name != "layer"]
    numbers = [name for name in own if not isinstance(choices[name][0], str)]
    return (numbers or own)[0]


def _layers_and_values(
    canvas: Canvas, rows: Sequence[Row], across: str, measure: str, name: str
) -> PagePicture:
    """The best score for every layer and value; many values are grouped into ranges."""
    layers = sorted({r["layer"] for r in rows})
    bins = _bins(sorted({r[across] for r in rows}))
    pick: Callable[..., float | None] = min if measure == "loss" else max
    cells = [
        [
            pick((r[measure] for r in rows if r["layer"] == i and r[across] in b), default=None)
            for b in bins
        ]
        for i in layers
    ]
    return heatmap(
        canvas,
        name,
        cells,
        rows=[str(i) for i in layers],
        columns=_short([b[0] for b in bins]),
        names=("first edited layer", across if len(bins[0]) == 1 else f"{across}, from"),
        title=f"Best {measure} by layer and {across}",
        caption=f"On validation, from {{low:.3g}} (faint) to {{high:.3g}} {SHOWN[measure].unit} "
        "(strong). Empty: not examined, or pruned early.",
        number=".0f" if measure == "accuracy" else ".2f",
    )


def _short(values: Sequence[Any]) -> list[str]:
    """Numbers in as few digits as tell them apart, at least two: sampled ones may have 16."""
    if isinstance(values[0], str):
        return list(values)
    for digits in range(2, 17):
        texts = [f"{int(v)}" if v == int(v) else f"{v:.{digits}g}" for v in values]
        if len(set(texts)) == len(set(values)):
            break
    return texts


def _bins(values: Sequence[Any]) -> list[list[Any]]:
    """The values one by one, or in `COLUMNS` groups of neighbours."""
    if len(values) <= COLUMNS:
        return [[v] for v in values]
    at = [round(n * len(values) / COLUMNS) for n in range(COLUMNS + 1)]
    return [list(values[i:j]) for i, j in pairwise(at)]


def _front(
    canvas: Canvas, rows: Sequence[Row], results: Mapping[str, Any], measure: str, name: str
) -> PagePicture:
    """All trials, the Pareto front, and the original."""
    with canvas.axes() as axes:
        x, y = [r["ratio"] for r in rows], [r[measure] for r in rows]
        axes.scatter(x, y, s=14, color=colour("before"), lw=0)
        best = _unbeaten(rows, measure)
        axes.plot(*zip(*best, strict=True), "o-", color=colour("accent"), ms=4.5)
        original = results["original"]["validation"][measure]
        axes.axhline(original, color=colour("ink"), lw=1, ls=(0, (3, 2)))
        axes.set(
            xlabel="ratio of the compressed matrices",
            ylabel=f"validation {_title(measure, results)}",
        )
        axes.set_xscale("log")
        axes.set_xticks(_nice(min(x), max(x)), minor=False)
        axes.xaxis.set_major_formatter("{x:g}×")
        axes.xaxis.set_minor_formatter("")
        title = f"{measure.capitalize()} against compression ratio"
        caption = (
            f"Blue: no trial beats these in both. Dashed: the original, {original:.4g}. "
            f"{len(rows)} trials examined in full."
        )
        return canvas.picture(axes, name, title=title, caption=caption, alt=title)


def _unbeaten(rows: Sequence[Row], measure: str) -> list[tuple[float, float]]:
    """Ratio and score of the trials on the Pareto front."""
    sign = 1 if SHOWN[measure].upwards else -1
    out: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda r: (-r["ratio"], -sign * r[measure])):
        if not out or sign * row[measure] > sign * out[-1][1]:
            out.append((row["ratio"], row[measure]))
    return out[::-1]


def _title(measure: str, results: Mapping[str, Any]) -> str:
    """The label of a score's axis; over several datasets it is the mean."""
    several = len(results.get("datasets", ())) > 1
    return f"mean {SHOWN[measure].title}" if several else SHOWN[measure].title


def _nice(low: float, high: float) -> list[float]:
    ticks = [m * 10.0**e for e in range(-1, 5) for m in (1, 2, 5)]
    return [t for t in ticks if low * 0.8 <= t <= high * 1.25] or [low]


def _history(
    canvas: Canvas, rows: Sequence[Row], results: Mapping[str, Any], measure: str, name: str
) -> PagePicture:
    """Trials in order of their numbers, and the best so far."""
    rows = sorted(rows, key=lambda row: row["number"])
    pick: Callable[..., float] = min if measure == "loss" else max
    numbers = [r["number"] for r in rows]
    values = [r[measure] for r in rows]
    best = [pick(values[: n + 1]) for n in range(len(rows))]
    with canvas.axes() as axes:
        axes.plot(numbers, values, ".", color=colour("before"), ms=6)
        axes.step(numbers, best, where="post", color=colour("accent"))
        axes.axhline(
            results["original"]["validation"][measure], color=colour("ink"), lw=1, ls=(0, (3, 2))
        )
        axes.set(xlabel="trial", ylabel=f"validation {_title(measure, results)}")
        title = "Trials in order"
        caption = "Blue: the best so far. Dashed: the original."
        return canvas.picture(axes, name, title=title, caption=caption, alt=title)
