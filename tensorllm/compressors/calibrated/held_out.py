"""How much more a matrix of low rank costs than its curve says, by a trial on other text.

A curve takes inputs and gradients for independent, errors for small, and the covariances that the
best matrix is chosen by for those of all text. On a real model truncated q and k then lose a
quarter to once, o and the FFN's matrices once to three times what their curves say, so that sizes
chosen by these alone leave too much to the first. One trial per matrix tells the factor; along a
curve it changes little.
Shapes: I and D of a role matrix, R rank.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from tensorllm.compressors.layer import LayerContext

SHARE = 2  # a trial keeps the full rank over this, or as many channels
MOST = 5.0  # times that a trial changes a curve, up or down: it is of one batch


class Trial(NamedTuple):
    """What a trial was expected to cost, and how many times that it did."""

    expected: float
    times: float


def mean_times(trials: Sequence[Trial]) -> float:
    """Of several matrices in one, by what each is expected to cost; 1 where that is nothing."""
    whole = sum(trial.expected for trial in trials)
    return sum(trial.expected * trial.times for trial in trials) / whole if whole > 0 else 1.0


def times_expected(context: LayerContext, weights: Mapping[str, Tensor], expected: float) -> float:
    """How many times what is expected the layer's output loses with these role matrices (I, D), on
    text that the covariances have not seen."""
    if not expected > 0:
        return 1.0
    return min(max(context.held_out_error(weights) / expected, 1 / MOST), MOST)
