"""One layer: what its factors cost at every rank, and the factors fitted to what it is given.

Shapes: M outputs of a map, X its inputs, R rank, N tokens of a batch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from tensorllm.calibration.groups import Group, Key, output_width, site_of
from tensorllm.calibration.moments import Moments
from tensorllm.calibration.sizes import candidates
from tensorllm.calibration.source import block_path
from tensorllm.models import RoleMatrices
from tensorllm.models.spec import FALLING
from tensorllm.tensors.factors import Factors, cast
from tensorllm.tensors.pivoted import PivotedLowRank, pivot
from tensorllm.tensors.weighted import Metric, left_out, regression, weighted_svd


@dataclass(frozen=True)
class Layer:
    """A layer's module and the matrices in it."""

    roles: RoleMatrices
    number: int
    block: nn.Module

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """By their names in the model."""
        path = block_path(self.roles, self.number)
        return {f"{path}.{name}": p for name, p in self.block.named_parameters()}

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: p.data for name, p in self.parameters.items()}

    def map(self, group: Group) -> Tensor:
        """The group's maps from inputs to outputs, stacked (M, X), float64, beside the moments."""
        return self.stacked(self.weights, group)

    def stacked(self, weights: Mapping[str, Tensor], group: Group) -> Tensor:
        """The same from other tensors of the weights' names and shapes."""
        parts = [self.roles.read(weights, self.number, role).cpu().double() for role in group]
        return torch.cat([w.mT if group[0] in FALLING else w for w in parts])

    def put(self, group: Group, factors: Factors) -> None:
        """Let the factors, in the dtype they are stored in, take the place of the weights."""
        weights = self.weights
        dtype = weights[self.roles.name(self.number, group[0])].dtype
        dense = cast(factors, dtype).dense()
        parts = site_of(self.number, group).unstack(dense, self.roles.geometry)
        for role, w_ID in zip(group, parts, strict=True):
            self.roles.write(weights, self.number, role, w_ID)

    def path(self, key: Key) -> str:
        """Below the layer, the module whose input the roles of the key read."""
        return self.roles.architecture.stored(key[1][0]).path

    def errors(self, moments: Moments, keys: Sequence[Key], sharing: bool) -> dict[Group, Tensor]:
        """(S,) per candidate group: what the best factors of ranks 1 to S cost."""
        out = {}
        for key in keys:
            inputs = Metric(moments.inputs[key])
            for group in candidates(key[1], sharing):
                felt = self.felt(moments, key, group)
                w_MX = self.map(group)
                if group[0] in FALLING:
                    out[group] = left_out(w_MX.mT, inputs, felt)
                else:
                    out[group] = left_out(w_MX, felt, inputs)
        return out

    def felt(self, moments: Moments, key: Key, group: Group) -> Metric:
        """What is felt at the outputs of some roles of a cluster."""
        if group == key[1]:
            return Metric(moments.gradients[key])
        widths = (output_width(self.roles.geometry, role) for role in key[1])
        ends = [0, *accumulate(widths)]
        rows = torch.cat([torch.arange(*ends[i : i + 2]) for i in map(key[1].index, group)])
        return Metric(moments.gradients[key][rows[:, None], rows])

    def factors(
        self, moments: Moments, key: Key, ranks: Mapping[Group, int]
    ) -> dict[Group, PivotedLowRank]:
        """Fitted to the original's own inputs."""
        inputs = Metric(moments.inputs[key])
        return {
            group: self._fitted(self.map(group), group, inputs, self.felt(moments, key, group), r)
            for group, r in ranks.items()
        }

    def corrected(
        self,
        moments: Moments,
        key: Key,
        ranks: Mapping[Group, int],
        cross_XX: Tensor,
        seen_XX: Tensor,
        ridge: float,
    ) -> dict[Group, PivotedLowRank]:
        """Fitted to other inputs y, so that the outputs are those of the original on its own x.

        Args:
            cross_XX: E[x yᵀ].
            seen_XX: E[y yᵀ].
        """
        inputs, out = Metric(seen_XX), {}
        for group, rank in ranks.items():
            w_MX = self.map(group)
            target_MX = regression(w_MX @ cross_XX, seen_XX, w_MX, ridge)
            felt = self.felt(moments, key, group)
            out[group] = self._fitted(target_MX, group, inputs, felt, rank)
        return out

    def _fitted(
        self, w_MX: Tensor, group: Group, inputs: Metric, felt: Metric, rank: int
    ) -> PivotedLowRank:
        """The best factors of the map at this rank."""
        return self.pivoted(*weighted_svd(w_MX, felt, inputs).truncate(rank), group)

    def pivoted(self, left_MR: Tensor, right_RX: Tensor, group: Group) -> PivotedLowRank:
        """A map's factors as those of the site's tensor: o and out are stacked transposed."""
        if group[0] in FALLING:
            factors = pivot(right_RX.mT, left_MR.mT)
        else:
            factors = pivot(left_MR, right_RX)
        return PivotedLowRank(factors.basis_RO.float(), factors.mix_XR.float(), factors.rows_R)


def second_moments(x: Iterable[Tensor], y: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """E[x yᵀ] and E[y yᵀ] over all tokens, float64; x and y are (N, X) per batch."""
    cross_XX, seen_XX, tokens = torch.zeros(()), torch.zeros(()), 0
    for x_NX, y_NX in zip(x, y, strict=True):
        y_NX = y_NX.double()
        cross_XX = cross_XX + (x_NX.double().mT @ y_NX).cpu()
        seen_XX = seen_XX + (y_NX.mT @ y_NX).cpu()
        tokens += len(y_NX)
    return cross_XX / tokens, seen_XX / tokens
