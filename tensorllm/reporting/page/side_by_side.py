"""Several subjects in one table and one plot."""

from collections.abc import Mapping, Sequence
from typing import Any

from tensorllm.evaluation.before_after import BeforeAfter
from tensorllm.reporting.page.subjects import Subject
from tensorllm.reporting.page.theme import Canvas, Picture, colour


def side_by_side(
    subjects: Sequence[Subject], views: Sequence[Mapping[str, Any]], canvas: Canvas
) -> dict[str, Any]:
    """The comparison at the top of a page of several subjects."""
    dataset = _common(subjects)
    rows = [_row(s, view, dataset) for s, view in zip(subjects, views, strict=True)]
    picture = _picture(subjects, dataset, canvas)
    return {
        "rows": rows,
        "where": dataset[0] if dataset else "",
        "pictures": [picture] if picture else [],
    }


def _common(subjects: Sequence[Subject]) -> tuple[str, ...] | None:
    """Dataset, split and protocol that most subjects were measured by; others do not compare."""
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
    for metric, digits in (("accuracy", 1), ("loss", 3)):
        value = found.after.get(metric) if found else None
        bounds = found.intervals_after.get(metric) if found else None
        row[metric] = "" if value is None else f"{value:.{digits}f}"
        row[f"{metric}_interval"] = (
            f"{bounds[0]:.{digits}f} to {bounds[1]:.{digits}f}" if bounds else ""
        )
    for name in ("attention_of_edited_layers", "whole_model", "bytes_on_disk"):
        row[name] = f"{ratios[name]:.4g}×" if name in ratios else ""
    return row


def _picture(
    subjects: Sequence[Subject], wanted: tuple[str, ...] | None, canvas: Canvas
) -> Picture | None:
    """Score of every subject, and of the originals they were made from."""
    found = [(s, m) for s in subjects if (m := _measured(s, wanted)) is not None]
    if len(found) < 2:
        return None
    metric = "accuracy" if all("accuracy" in m.after for _, m in found) else "loss"
    bars: dict[str, tuple[float, Sequence[float] | None, str]] = {}
    for subject, measured in found:
        if measured.before is not None:
            original = measured.before[metric], measured.intervals_before.get(metric), "before"
            bars.setdefault(f"{subject.model}, original", original)
    for number, (subject, measured) in enumerate(found, 1):
        name = subject.title if subject.title not in bars else f"{subject.title} ({number})"
        bars[name] = measured.after[metric], measured.intervals_after.get(metric), "accent"
    digits = 1 if metric == "accuracy" else 3
    with canvas.axes(0.75 + 0.3 * len(bars)) as axes:
        top = max(bounds[1] if bounds else value for value, bounds, _ in bars.values())
        for at, (value, bounds, shade) in enumerate(bars.values()):
            axes.barh(at, value, height=0.6, color=colour(shade))
            if bounds:
                axes.plot(bounds, [at, at], color=colour("ink"), lw=1.4, solid_capstyle="butt")
            end = bounds[1] if bounds else value
            axes.text(end + 0.02 * top, at, f"{value:.{digits}f}", va="center")
        axes.set_yticks(range(len(bars)), list(bars))
        axes.tick_params(axis="y", labelcolor=colour("ink"))
        axes.set(xlim=(0, 1.18 * top), ylim=(len(bars) - 0.4, -0.6), xlabel=metric)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        title = f"{metric.capitalize()} on {found[0][1].dataset}"
        caption = f"{found[0][1].where}; lines are 95 % intervals where they are known."
        return canvas.picture(axes, "comparison", title=title, caption=caption, alt=title)
