"""A table of numbers as coloured cells."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from tensorllm.reporting.page.theme import SEQUENCE, Canvas, PagePicture, colour


def heatmap(
    canvas: Canvas,
    name: str,
    cells: Sequence[Sequence[float | None]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    names: tuple[str, str],
    title: str,
    caption: str = "From {low:.3g} (faint) to {high:.3g} (strong): the share of the norm lost.",
    number: str = ".2f",
) -> PagePicture:
    """Cells in six shades, with their numbers written in if there is room.

    Args:
        canvas: draws the plot.
        name: of the plot's files.
        cells: a row of values per name in `rows`; None for an empty cell.
        rows, columns: names of the cells, down and across.
        names: of the axes, down and across.
        title: of the plot.
        caption: its placeholders `low` and `high` are filled in.
        number: format of the numbers.
    """
    found = [value for line in cells for value in line if value is not None]
    low, high = min(found), max(found)
    edges = [low + (high - low) * n / len(SEQUENCE) for n in range(1, len(SEQUENCE))]
    room = len(columns) <= 8 and len(rows) <= 16
    height = min(5.5, max(1.5, 0.8 + (0.3 if room else 0.2) * len(rows)))
    with canvas.axes(height) as axes:
        for i, line in enumerate(cells):
            for j, value in enumerate(line):
                if value is None:
                    continue
                shade = sum(value > edge for edge in edges)
                axes.fill(
                    [j + 0.03, j + 0.97, j + 0.97, j + 0.03],
                    [i + 0.04, i + 0.04, i + 0.96, i + 0.96],
                    color=colour(SEQUENCE[shade]),
                    lw=0,
                )
                if room:
                    ink = colour("on" if shade > 3 else "ink")
                    style = {"ha": "center", "va": "center", "color": ink, "fontsize": 9}
                    axes.text(j + 0.5, i + 0.5, format(value, number), **style)
        axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0), xlabel=names[1], ylabel=names[0])
        axes.grid(False)
        axes.spines[:].set_visible(False)
        _ticks(axes.yaxis, rows)
        _ticks(axes.xaxis, columns)
        caption = caption.format(low=low, high=high)
        alt = f"{title}: {low:.3g} to {high:.3g}"
        return canvas.picture(axes, name, title=title, caption=caption, alt=alt)


def _ticks(axis: Any, labels: Sequence[str]) -> None:
    """Label as many cells as there is room for: every one, every second, ..., or the first."""
    for step in range(1, len(labels) + 1):
        axis.set_ticks([n + 0.5 for n in range(0, len(labels), step)], labels[::step])
        if not overlap(axis):
            return


def overlap(axis: Any) -> bool:
    """Whether an axis' labels touch when drawn, as those of sampled values may."""
    axis.get_figure().draw_without_rendering()  # lays out the figure and measures the text
    boxes = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text()]
    gap = boxes[0].height / 3 if boxes else 0
    across = axis.axis_name == "x"
    spans = sorted((b.x0, b.x1 + gap) if across else (b.y0, b.y1) for b in boxes)
    return any(end > start for (_, end), (start, _) in pairwise(spans))
