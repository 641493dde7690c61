"""Numbers as the page writes them."""

from collections.abc import Sequence


def times(ratio: float) -> str:
    return f"{ratio:.3g}×" if ratio >= 100 else f"{ratio:.2f}×"


def signed(x: float, digits: int) -> str:
    """With a sign that is as wide as a plus."""
    return f"{x:+.{digits}f}".replace("-", "−")


def duration(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def between(bounds: Sequence[float] | None, digits: int) -> str:
    """An interval; empty where there is none."""
    if not bounds:
        return ""
    return " to ".join(f"{x:.{digits}f}".replace("-", "\N{MINUS SIGN}") for x in bounds)
