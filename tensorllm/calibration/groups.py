"""Which roles read one input, how they may be grouped, and the sizes of their maps.

Shapes: M outputs of a map, X its inputs.
"""

from collections.abc import Sequence

from tensorllm.compressors import Site
from tensorllm.models.spec import FALLING
from tensorllm.tensors.allocation import Choice
from tensorllm.tensors.shared_input import rows_stacking
from tensorllm.tensors.stacking import Geometry

Key = tuple[int, tuple[str, ...]]  # a layer, and roles that read the same input
Group = tuple[str, ...]  # roles with one input factor
Ranks = dict[tuple[int, Group], int]


def input_width(geometry: Geometry, role: str) -> int:
    """X of the role's matrix."""
    return geometry.inner(role) if role in FALLING else geometry.D


def output_width(geometry: Geometry, role: str) -> int:
    """M of the role's matrix."""
    return geometry.D if role in FALLING else geometry.inner(role)


def site_of(layer: int, group: Group) -> Site:
    return Site((layer,), group, rows_stacking(group))


def groupings(cluster: Group, sharing: bool) -> list[list[Group]]:
    """All ways to group the roles of a cluster; without sharing each role alone."""
    if not sharing:
        return [[(role,) for role in cluster]]
    ways: list[list[Group]] = [[]]
    for role in cluster:
        ways = [
            new
            for way in ways
            for new in (
                [*way, (role,)],
                *([*way[:i], (*way[i], role), *way[i + 1 :]] for i in range(len(way))),
            )
        ]
    return ways


def ranks_of(
    keys: Sequence[Key], ways: Sequence[list[list[Group]]], choices: Sequence[Choice]
) -> Ranks:
    return {
        (layer, group): rank
        for (layer, _), ways_here, choice in zip(keys, ways, choices, strict=True)
        for group, rank in zip(ways_here[choice.way], choice.ranks, strict=True)
    }
