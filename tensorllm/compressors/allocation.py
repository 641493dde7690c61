"""One budget of numbers, allocated to all sites of a model by their error curves."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from tensorllm.compressors.base import ErrorCurve, Groupings
from tensorllm.compressors.layer import Site, Size
from tensorllm.tensors.allocation import Curve, allocate, error_of


@dataclass(frozen=True, slots=True)
class Allocation:
    """The size of every site, and the summed error that remains according to the curves."""

    sizes: dict[Site, Size]
    error: float


def with_whole(curve: ErrorCurve, numbers: int) -> ErrorCurve:
    """A curve that ends with the tensor itself (size all 0, no error).

    Sizes that store as much as the tensor or more are dropped; a curve that already has the tensor
    itself is returned unchanged.

    Args:
        curve: of the tensor.
        numbers: of the tensor itself.
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


def share_out(
    clusters: Sequence[Groupings],
    curves: Mapping[Site, ErrorCurve],
    numbers: int,
    tied: Collection[Site] = (),
) -> Allocation:
    """Sizes that store at most `numbers` and about minimise the summed error.

    Layers and matrices compete for one budget, by the error that each stored number removes. For
    each cluster of matrices one grouping is chosen.

    Args:
        clusters: the alternative groupings of each cluster of matrices.
        curves: of every site.
        numbers: that may be stored.
        tied: sites that all get the same size; no other grouping contains their matrices.

    Raises:
        UserError: even the smallest sizes store more.
    """
    free = [
        groupings
        for groupings in clusters
        if not any(job.site in tied for grouping in groupings for job in grouping)
    ]
    curves_of = [
        [
            [Curve(curves[job.site].cost_N, curves[job.site].error_N) for job in grouping]
            for grouping in groupings
        ]
        for groupings in free
    ]
    if tied:
        together = _together([curves[site] for site in tied])
        curves_of.append([[Curve(together.cost_N, together.error_N)]])
    choices = allocate(curves_of, numbers)
    sizes: dict[Site, Size] = {}
    for groupings, choice in zip(free, choices[: len(free)], strict=True):
        for job, point in zip(groupings[choice.grouping], choice.ranks, strict=True):
            sizes[job.site] = tuple(curves[job.site].sizes_NC[point - 1].tolist())
    if tied:
        (point,) = choices[-1].ranks
        sizes |= dict.fromkeys(tied, tuple(together.sizes_NC[point - 1].tolist()))
    return Allocation(sizes, error_of(curves_of, choices))


def _together(curves: Sequence[ErrorCurve]) -> ErrorCurve:
    """Total cost and error of sites of equal size, at the sizes that all of them may have."""
    common = set.intersection(*({tuple(size) for size in c.sizes_NC.tolist()} for c in curves))
    kept = [torch.tensor([tuple(s) in common for s in c.sizes_NC.tolist()]) for c in curves]
    costs = [c.cost_N[here] for c, here in zip(curves, kept, strict=True)]
    errors = [c.error_N[here.to(c.error_N.device)] for c, here in zip(curves, kept, strict=True)]
    sizes_NC = curves[0].sizes_NC[kept[0]]
    return ErrorCurve(torch.stack(costs).sum(0), torch.stack(errors).sum(0), sizes_NC)
