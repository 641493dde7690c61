"""Plots of how a model answers and runs: before and after, each example's change, speed."""

from collections.abc import Mapping, Sequence
from typing import Any

from tensorllm.evaluation.before_after import BeforeAfter
from tensorllm.evaluation.predictions import Prediction
from tensorllm.reporting.page.theme import Canvas, PagePicture, colour
from tensorllm.shown import MAIN, SHOWN


def score_pictures(canvas: Canvas, found: BeforeAfter, prefix: str) -> list[PagePicture]:
    """Before and after, with their intervals, one plot per metric."""
    if found.before is None:
        return []
    return [
        _beside(canvas, found, metric, f"{prefix}{metric}")
        for metric in MAIN
        if metric in found.after
    ]


def _beside(canvas: Canvas, found: BeforeAfter, metric: str, name: str) -> PagePicture:
    assert found.before is not None
    before, after = found.before[metric], found.after[metric]
    shown = SHOWN[metric]
    verdict = colour("good" if shown.better(after - before) else "bad")
    bars = [
        (0, before, found.intervals_before.get(metric), colour("before")),
        (1, after, found.intervals_after.get(metric), verdict),
    ]
    with canvas.axes(1.35) as axes:
        top = max(bounds[1] if bounds else value for _, value, bounds, _ in bars)
        for at, value, bounds, shade in bars:
            axes.barh(at, value, height=0.56, color=shade)
            if bounds:
                axes.plot(bounds, [at, at], color=colour("ink"), lw=1.4, solid_capstyle="butt")
            end = bounds[1] if bounds else value
            axes.text(end + 0.02 * top, at, shown.brief(value), va="center", ha="left")
        axes.set_yticks([0, 1], ["before", "after"])
        axes.tick_params(axis="y", labelcolor=colour("ink"))
        axes.set(xlim=(0, 1.16 * top), ylim=(1.5, -0.5), xlabel=shown.title)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        title = f"{metric.capitalize()} on {found.dataset}"
        spread = "; lines are 95 % intervals" if found.intervals_after else ""
        caption = f"{found.where[len(found.dataset) + 2 :]}{spread}."
        alt = f"{title}: {shown.brief(before)} before, {shown.brief(after)} after"
        return canvas.picture(
            axes, name, title=title, caption=caption[0].upper() + caption[1:], alt=alt
        )


def change_picture(
    canvas: Canvas, before: Sequence[Prediction], after: Sequence[Prediction], prefix: str
) -> PagePicture:
    """How much each example's loss changed."""
    moved = [new.loss - old.loss for old, new in zip(before, after, strict=True)]
    edge = sorted(abs(x) for x in moved)[int(0.99 * (len(moved) - 1))] or 1.0
    bins = [edge * (n / 20 - 1) for n in range(41)]
    better = [x for x in moved if x < 0]
    worse = [x for x in moved if x >= 0]
    with canvas.axes(2.1) as axes:
        for values, shade in ((better, "good"), (worse, "bad")):
            inside = [min(max(x, -edge), edge * 0.999) for x in values]
            axes.hist(inside, bins=bins, color=colour(shade), rwidth=0.88, lw=0)
        axes.axvline(0, color=colour("muted"), lw=1)
        axes.set(xlabel="change of the loss, nats per token", ylabel="examples")
        axes.grid(axis="x", visible=False)
        share = 100 * len(better) / len(moved)
        title = "Change of each example's loss"
        caption = (
            f"Left of the line, {share:.0f} % of the examples became more probable. "
            "The outermost bars hold what lies beyond, too."
        )
        alt = f"{title}: {share:.0f} % became more probable"
        return canvas.picture(axes, f"{prefix}loss-changes", title=title, caption=caption, alt=alt)


SPEED = (  # key of the ratio, its label
    ("prefill", "prompt"),
    ("decode", "decoding"),
    ("weights", "weights"),
    ("keys", "cached keys"),
    ("values", "cached values"),
    ("peak", "peak memory"),
)


def speed_picture(canvas: Canvas, found: Mapping[str, Any], prefix: str) -> PagePicture:
    """Gains of running factored over dense; 1 means equal."""
    bars = [(name, found["ratios"][key]) for key, name in SPEED if key in found["ratios"]]
    with canvas.axes(0.7 + 0.27 * len(bars)) as axes:
        top = max(1.25, *(value for _, value in bars))
        for at, (_, value) in enumerate(bars):
            shade = "good" if value > 1.005 else "before" if value > 0.995 else "bad"
            axes.barh(at, value, height=0.6, color=colour(shade))
            axes.text(max(value, 1) + 0.02 * top, at, f"{value:.2f}×", va="center")
        axes.axvline(1, color=colour("ink"), lw=1, ls=(0, (3, 2)))
        axes.set_yticks(range(len(bars)), [name for name, _ in bars])
        axes.tick_params(axis="y", labelcolor=colour("ink"))
        axes.set(xlim=(0, 1.2 * top), ylim=(len(bars) - 0.4, -0.6), xlabel="gain over dense")
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        title = "Speed and memory beside the dense model"
        caption = "Right of the dashed line running in the factors is faster or smaller."
        alt = f"{title}: " + ", ".join(f"{name} {value:.2f} times" for name, value in bars)
        return canvas.picture(axes, f"{prefix}speed", title=title, caption=caption, alt=alt)
