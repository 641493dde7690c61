"""Role matrices as maps from inputs to outputs, stacked if they read the same input.

Shapes: M outputs of the stacked maps, X their inputs, R rank, I and D of a role matrix.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tensorllm.compressors.layer import Site
from tensorllm.tensors.factors import wide
from tensorllm.tensors.pivoted import PivotedLowRank, pivot
from tensorllm.tensors.shared_input import rows_stacking
from tensorllm.tensors.stacking import Geometry, is_output_projection

Group = tuple[str, ...]  # roles that read one input and share an input factor


class Map(NamedTuple):
    """A map of rank R as the product of its factors."""

    left_MR: Tensor
    right_RX: Tensor


def site_of(layer: int, roles: Group) -> Site:
    """Roles of a layer as one site, concatenated along their rows."""
    return Site((layer,), roles, rows_stacking(roles))


def map_shape(geometry: Geometry, roles: Group) -> tuple[int, int]:
    """The shape (M, X) of the stacked maps of these roles."""
    return sum(map(geometry.outputs, roles)), geometry.inputs(roles[0])


def stacked(weights: Mapping[str, Tensor], roles: Group) -> Tensor:
    """Role matrices (I, D) as stacked maps (M, X), in float32 or wider, on their device."""
    parts = [wide(weights[role]) for role in roles]
    return torch.cat([w.mT if is_output_projection(roles[0]) else w for w in parts])


def pivoted(left_MR: Tensor, right_RX: Tensor, roles: Group) -> PivotedLowRank:
    """Pivoted factors of a map, in the orientation of the site: o and out are transposed."""
    if is_output_projection(roles[0]):
        factors = pivot(right_RX.mT, left_MR.mT)
        return PivotedLowRank(factors.basis_RO.float(), factors.mix_XR.float(), factors.rows_R)
    factors = pivot(left_MR, right_RX)
    basis_OR, mix_RX = (t.float().mT.contiguous() for t in (factors.basis_RO, factors.mix_XR))
    return PivotedLowRank(basis_OR.mT, mix_RX.mT, factors.rows_R, transposed=True)
