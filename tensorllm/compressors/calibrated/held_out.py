"""The measured error of truncating a matrix relative to its error curve, on held-out text.

A curve assumes that inputs and gradients are independent and errors small, and it is computed from
the same covariances as the best matrix of each rank. On a real model, truncated q and k change the
layer's output by 0.1 to 1.9 times the prediction, o and the FFN's matrices by 1 to 4 times
(docs/methods/activation_measured.md). One trial per matrix gives the factor for its whole curve.

Shapes: I and D of a role matrix.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from tensorllm.compressors.layer import LayerContext
from tensorllm.compressors.operators import LinearOperator

SHARE = 2  # a trial divides the full rank, or the number of channels, by this
LARGEST = 5.0  # bound of the ratio and its inverse, as a trial uses only one batch


class Trial(NamedTuple):
    """The error predicted by the curve, and the ratio of the measured error to it."""

    predicted: float
    ratio: float


def mean_ratio(trials: Sequence[Trial]) -> float:
    """The mean ratio of matrices that share a factor, weighted by predicted error.

    1 if that error is 0.
    """
    whole = sum(trial.predicted for trial in trials)
    return sum(trial.predicted * trial.ratio for trial in trials) / whole if whole > 0 else 1.0


def error_ratio(
    context: LayerContext, weights: Mapping[str, Tensor | LinearOperator], predicted: float
) -> float:
    """The ratio of measured to predicted error of the layer's output on held-out text.

    Args:
        context: of the layer.
        weights: role matrices (I, D), or operators, in place of the layer's own.
        predicted: the predicted error.
    """
    if not predicted > 0:
        return 1.0
    return min(max(context.held_out_error(weights) / predicted, 1 / LARGEST), LARGEST)
