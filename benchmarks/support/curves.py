"""How a cost grows with one size: times at some sizes, and the exponent that fits them."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

Prepare = Callable[[int], Callable[[], Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """What is measured.

    Attributes:
        over: the size that grows, in words.
        xs: its values, and `quick` tiny ones.
        prepare: a size -> what is timed; making its input is not.
        expected: the exponent by counting operations, or a function that counts them (or bytes)
            at a size: then the exponent is the one between the first and the last size.
        x: size -> what stands on the axis, where that is another number.
        turns: the fastest of so many counts.
    """

    over: str
    xs: Sequence[int]
    quick: Sequence[int]
    prepare: Prepare
    expected: float | Callable[[int], float]
    x: Callable[[int], float] = float
    turns: int = 3

    def measure(self, quick: bool) -> dict[str, Any]:
        """Points, and the power law through them."""
        xs = self.quick if quick else self.xs
        points = [[self.x(x), seconds(self.prepare(x), self.turns)] for x in xs]
        expected = self.expected
        if callable(expected):
            ends = [(math.log(self.x(x)), math.log(expected(x))) for x in (xs[0], xs[-1])]
            expected = (ends[1][1] - ends[0][1]) / (ends[1][0] - ends[0][0])
        return {"over": self.over, "expected": expected, "points": points, **fit(points)}


def seconds(call: Callable[[], Any], turns: int) -> float:
    """The fastest turn; the first one also warms up and counts where it alone takes long."""
    times: list[float] = []
    while len(times) < turns and sum(times) < 60:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def fit(points: Sequence[Sequence[float]]) -> dict[str, Any]:
    """seconds = factor * size**exponent by least squares of the logarithms.

    `plus_minus` is half the exponent's 95 % interval (Student's t; what the spread of these points
    about a straight line says, not what lies beyond them); None of fewer than three points.
    """
    logs = [(math.log(x), math.log(y)) for x, y in points]
    line = stats.linregress([x for x, _ in logs], [y for _, y in logs])
    free = len(points) - 2
    wide = float(stats.t.ppf(0.975, free) * line.stderr) if free > 0 else None
    return {
        "exponent": float(line.slope),
        "plus_minus": wide,
        "factor": math.exp(float(line.intercept)),
    }
