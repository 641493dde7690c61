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

from tensorllm.compressors.applied import Applied
from tensorllm.compressors.layer import LayerContext

SHARE = 2  # a trial keeps the full rank, or all channels, divided by this
MOST = 5.0  # largest factor, up or down: a trial is of one batch


class Trial(NamedTuple):
    """The error that the curve predicts, and how many times that the trial measured."""

    expected: float
    times: float


def mean_times(trials: Sequence[Trial]) -> float:
    """The mean over matrices that share a factor, by predicted error; 1 where that is 0."""
    whole = sum(trial.expected for trial in trials)
    return sum(trial.expected * trial.times for trial in trials) / whole if whole > 0 else 1.0


def times_expected(
    context: LayerContext, weights: Mapping[str, Tensor | Applied], expected: float
) -> float:
    """The error of the layer's output on held-out text with these role matrices (I, D), relative to
    the predicted one."""
    if not expected > 0:
        return 1.0
    return min(max(context.held_out_error(weights) / expected, 1 / MOST), MOST)
