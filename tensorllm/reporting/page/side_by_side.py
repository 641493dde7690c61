"""Compare several subjects in one table and one plot per metric."""

from collections.abc import Mapping, Sequence
from typing import Any

from tensorllm.evaluation.before_after import BeforeAfter
from tensorllm.reporting.page.figures import between, times
from tensorllm.reporting.page.subjects import Subject
from tensorllm.reporting.page.theme import Canvas, PagePicture, colour
from tensorllm.shown import MAIN, SHOWN

LONGEST = 38  # characters of a name in a plot


def side_by_side(
    subjects: Sequence[Subject], views: Sequence[Mapping[str, Any]], canvas: Canvas
) -> dict[str, Any]:
    """The comparison at the top of a page of several subjects."""
    dataset = _common(subjects)
    rows = [_row(s, view, dataset) for s, view in zip(subjects, views, strict=True)]
    return {
        "rows": rows,
        "metrics": [(m, SHOWN[m].title) for m in MAIN if any(row[m] for row in rows)],
        "where": dataset[0] if dataset else "",
        "pictures": _pictures(subjects, dataset, canvas),
    }


def _common(subjects: Sequence[Subject]) -> tuple[str, ...] | None:
    """Dataset, split and protocol used for most subjects; other scores do not compare."""
    counts: dict[tuple[str, ...], int] = {}
    for subject in subjects:
        for found in subject.measured():
            key = _key(found)
            counts[key] = counts.get(key, 0) + 1
    return max(counts, key=lambda key: counts[key]) if counts else None


def _key(found: BeforeAfter) -> tuple[str, ...]:
    return found.where, found.dataset, found.split, found.protocol


def _measured(subject: Subject, wanted: tuple[str, ...] | None) -> BeforeAfter | None:
    return next((found for found in subject.measured() if _key(found) == wanted), None)


def _row(
    subject: Subject, view: Mapping[str, Any], wanted: tuple[str, ...] | None
) -> dict[str, str]:
    found = _measured(subject, wanted)
    ratios = subject.report["ratios"] if subject.report else {}
    row = {"id": view["id"], "title": view["title"]}
    for metric in MAIN:
        value = found.after.get(metric) if found else None
        bounds = found.intervals_after.get(metric) if found else None
        row[metric] = "" if value is None else SHOWN[metric].brief(value)
        row[f"{metric}_interval"] = between(bounds, SHOWN[metric].digits - 1)
    for name in ("attention_of_edited_layers", "whole_model", "bytes_on_disk"):
        row[name] = times(ratios[name]) if name in ratios else ""
    return row


def _pictures(
    subjects: Sequence[Subject], wanted: tuple[str, ...] | None, canvas: Canvas
) -> list[PagePicture]:
    """A plot for each metric that every measured subject has."""
    found = [(s, m) for s in subjects if (m := _measured(s, wanted)) is not None]
    metrics = [m for m in MAIN if found and all(m in measured.after for _, measured in found)]
    return [_bars(found, metric, canvas) for metric in metrics] if len(found) > 1 else []


def _bars(found: Sequence[tuple[Subject, BeforeAfter]], metric: str, canvas: Canvas) -> PagePicture:
    """The score of every subject, and of the original models."""
    bars: dict[str, tuple[float, Sequence[float] | None, str]] = {}
    for subject, measured in found:
        if measured.before is not None:
            original = measured.before[metric], measured.intervals_before.get(metric), "before"
            bars.setdefault(f"{subject.name}, original", original)
    for number, (subject, measured) in enumerate(found, 1):
        name = subject.title if subject.title not in bars else f"{subject.title} ({number})"
        bars[name] = measured.after[metric], measured.intervals_after.get(metric), "accent"
    with canvas.axes(0.6 + 0.42 * len(bars)) as axes:
        top = max(bounds[1] if bounds else value for value, bounds, _ in bars.values())
        for at, (name, (value, bounds, shade)) in enumerate(bars.items()):
            axes.barh(at, value, height=0.34, color=colour(shade))
            if bounds:
                axes.plot(bounds, [at, at], color=colour("ink"), lw=1.4, solid_capstyle="butt")
            end = bounds[1] if bounds else value
            axes.text(end + 0.02 * top, at, SHOWN[metric].brief(value), va="center")
            axes.text(0, at - 0.24, _short(name), va="bottom")  # above its bar: names are long
        axes.set_yticks([])
        axes.set(xlim=(0, 1.16 * top), ylim=(len(bars) - 0.7, -0.75), xlabel=SHOWN[metric].title)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        title = f"{metric.capitalize()} on {found[0][1].dataset}"
        caption = "Lines are 95 % intervals where they are known."
        return canvas.picture(axes, f"comparison-{metric}", title=title, caption=caption, alt=title)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"…{name[-LONGEST:]}"
