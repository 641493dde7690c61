"""Which roles are grouped and the rank of each group, out of one budget.

Shapes: S ranks of a group, 1 to S; M outputs of a map, X its inputs.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tensorllm.calibration.groups import (
    Group,
    Key,
    Ranks,
    groupings,
    input_width,
    output_width,
    ranks_of,
)
from tensorllm.compressors import ActivationTucker
from tensorllm.errors import UserError
from tensorllm.tensors.allocation import Curve, allocate
from tensorllm.tensors.pivoted import pivoted_parameters
from tensorllm.tensors.stacking import Geometry

Errors = Mapping[tuple[int, Group], Tensor]  # (S,): what the best factors of each rank cost


def shape_of(geometry: Geometry, group: Group) -> tuple[int, int]:
    """(M, X) of the group's maps, stacked."""
    return sum(output_width(geometry, role) for role in group), input_width(geometry, group[0])


def candidates(cluster: Group, sharing: bool) -> list[Group]:
    """Every group that some way of grouping has, each once."""
    return list(dict.fromkeys(group for way in groupings(cluster, sharing) for group in way))


def sizes(
    keys: Sequence[Key], errors: Errors, geometry: Geometry, *, sharing: bool, budget: int
) -> Ranks:
    """The ranks of all groups with about the least error in sum."""
    ways = [groupings(cluster, sharing) for _, cluster in keys]
    clusters = [
        [[_curve(geometry, group, errors[layer, group]) for group in way] for way in ways_here]
        for (layer, _), ways_here in zip(keys, ways, strict=True)
    ]
    return ranks_of(keys, ways, allocate(clusters, budget))


def budget_of(
    compressor: ActivationTucker, keys: Sequence[Key], geometry: Geometry, parameters: int
) -> int:
    """How many numbers the factors may hold in all.

    Args:
        parameters: of the whole model.

    Raises:
        UserError: the budget is below what the smallest factors store; found before any work.
    """
    before, least = numbers(keys, geometry), least_numbers(keys, geometry, compressor.sharing)
    if compressor.target_ratio is not None:
        budget = int(before / compressor.target_ratio)
        if budget < least:
            raise UserError(
                f"the smallest factors that there are (rank 1) store {least} numbers, "
                f"{before / least:.1f} times fewer than now; target_ratio "
                f"{compressor.target_ratio:g} would leave {budget}"
            )
        return budget
    assert compressor.target_params is not None
    rest = parameters - before
    if compressor.target_params < rest + least:
        raise UserError(
            f"target_params must be {rest + least} or more, got {compressor.target_params}: "
            f"this mode does not touch {rest} parameters, and the smallest factors that there are "
            f"(rank 1) store {least}"
        )
    return compressor.target_params - rest


def numbers(keys: Sequence[Key], geometry: Geometry) -> int:
    """Numbers in the matrices that are fitted."""
    shapes = [shape_of(geometry, (role,)) for _, cluster in keys for role in cluster]
    return sum(outputs * inputs for outputs, inputs in shapes)


def least_numbers(keys: Sequence[Key], geometry: Geometry, sharing: bool) -> int:
    """Numbers of the smallest factors: rank 1, for all roles of a cluster together if allowed."""
    groups = [g for _, cluster in keys for g in groupings(cluster, sharing)[-1 if sharing else 0]]
    return sum(pivoted_parameters(shape_of(geometry, group), 1) for group in groups)


def _curve(geometry: Geometry, group: Group, errors_S: Tensor) -> Curve:
    shape = shape_of(geometry, group)
    costs = [pivoted_parameters(shape, rank) for rank in range(1, len(errors_S) + 1)]
    return Curve(torch.tensor(costs), errors_S)
