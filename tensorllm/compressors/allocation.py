"""One budget of numbers, shared out over all sites of a model by their error curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tensorllm.compressors.base import ErrorCurve, Ways
from tensorllm.compressors.layer import Site, Size
from tensorllm.tensors.allocation import Curve, allocate, error_of


@dataclass(frozen=True, slots=True)
class Allocation:
    """The size of every site, and the summed error that the curves say is left."""

    sizes: dict[Site, Size]
    error: float


def with_whole(curve: ErrorCurve, numbers: int) -> ErrorCurve:
    """The curve of a tensor without sizes that store no less than the tensor itself, which is the
    last size (all 0, no error); a curve that has the tensor itself already stays what it is.

    Args:
        numbers: of the tensor.
    """
    cost_N, error_N, sizes_NC = curve
    if not sizes_NC.any(1).all():
        return curve
    smaller_N = cost_N < numbers
    return ErrorCurve(
        torch.cat((cost_N[smaller_N], cost_N.new_tensor([numbers]))),
        torch.cat((error_N[smaller_N], error_N.new_zeros(1))),
        torch.cat((sizes_NC[smaller_N], torch.zeros_like(sizes_NC[:1]))),
    )


def share_out(ways: Sequence[Ways], curves: Mapping[Site, ErrorCurve], numbers: int) -> Allocation:
    """Sizes that store at most `numbers` with about the least summed error.

    Each size is worth the error that it takes away per number that it costs; layers and matrices
    compete for one budget. Of several ways to group matrices one is chosen.

    Raises:
        UserError: even the smallest sizes store more.
    """
    clusters = [
        [
            [Curve(curves[job.site].cost_N, curves[job.site].error_N) for job in way]
            for way in ways_here
        ]
        for ways_here in ways
    ]
    choices = allocate(clusters, numbers)
    sizes: dict[Site, Size] = {}
    for ways_here, choice in zip(ways, choices, strict=True):
        for job, point in zip(ways_here[choice.way], choice.ranks, strict=True):
            sizes[job.site] = tuple(curves[job.site].sizes_NC[point - 1].tolist())
    return Allocation(sizes, error_of(clusters, choices))
