"""How much truncating a matrix costs beside what its error curve predicts, on held-out text.

A curve assumes that inputs and gradients are independent and errors small, and it is computed from
the same covariances as the best matrix of each rank. On a real model, truncated q and k then move
the layer's output by 0.1 to 1.9 times what is predicted, o and the FFN's matrices by 1 to 4 times
(docs/methods/activation_measured.md). One trial per matrix gives the factor for its whole curve.
Shapes: I and D of a role matrix.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from tensorllm.compressors.layer import LayerContext
from tensorllm.compressors.operators import LinearOperator

SHARE = 2  # a trial keeps the full rank, or all channels, divided by this
LARGEST = 5.0  # ratio, up or down: a trial is on one batch


class Trial(NamedTuple):
    """The error that the curve predicts, and the measured error over it."""

    predicted: float
    ratio: float


def mean_ratio(trials: Sequence[Trial]) -> float:
    """The mean over matrices that share a factor, by predicted error; 1 where that is 0."""
    whole = sum(trial.predicted for trial in trials)
    return sum(trial.predicted * trial.ratio for trial in trials) / whole if whole > 0 else 1.0


def error_ratio(
    context: LayerContext, weights: Mapping[str, Tensor | LinearOperator], predicted: float
) -> float:
    """The error of the layer's output on held-out text with these role matrices (I, D), relative to
    the predicted one."""
    if not predicted > 0:
        return 1.0
    return min(max(context.held_out_error(weights) / predicted, 1 / LARGEST), LARGEST)
