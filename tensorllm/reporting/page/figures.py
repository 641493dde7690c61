"""Numbers as the page formats them."""

from collections.abc import Sequence
from pathlib import Path

from tensorllm.shown import SHOWN


def short_name(model: str) -> str:
    """A folder's own name; short names and hub ids unchanged."""
    path = Path(model)
    return path.name if path.is_absolute() or path.parts[:1] in (("..",), (".",)) else model


def times(ratio: float) -> str:
    """A ratio to three digits or two decimals."""
    return f"{ratio:.3g}×" if ratio >= 100 else f"{ratio:.2f}×"


def smaller(ratio: float) -> tuple[float, str]:
    """How many times fewer parameters, and these words; below 1, how many times more."""
    return (ratio, "fewer parameters") if ratio >= 1 else (1 / ratio, "more parameters")


def signed(x: float, digits: int) -> str:
    """A number with its sign, using a minus as wide as a plus."""
    return f"{x:+z.{digits}f}".replace("-", "−")


def duration(seconds: float) -> str:
    """Seconds; milliseconds below one second."""
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def between(bounds: Sequence[float] | None, digits: int) -> str:
    """An interval; empty if there is none."""
    if not bounds:
        return ""
    return " to ".join(f"{x:.{digits}f}".replace("-", "\N{MINUS SIGN}") for x in bounds)


def score_tile(metric: str, where: str, after: float, before: float | None) -> dict[str, str]:
    """A score, and its change from the original's if that is known."""
    shown = SHOWN[metric]
    sign = f" {shown.unit}" if shown.unit == "%" else ""  # longer units go into the label
    tile = {
        "label": f"{shown.name} {where}" + ("" if sign else f", {shown.unit}"),
        "value": f"{shown.brief(after)}{sign}",
        "note": "",
        "tone": "",
    }
    if before is not None:
        points = " points" if sign else ""
        change = signed(after - before, shown.digits - 1)
        tile["note"] = f"{change}{points} from {shown.brief(before)}"
        tile["tone"] = shown.tone(after - before)
    return tile
