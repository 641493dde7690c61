"""What is known of a layer's matrices at the model's width, and the best maps by it.

Shapes: D model width, M outputs of the stacked maps of a site, R rank.
"""

from dataclasses import dataclass, field
from functools import cached_property, partial, reduce
from typing import NamedTuple, Self

import torch
from torch import Tensor

from tensorllm.compressors.applied import Product, Reading
from tensorllm.compressors.calibrated.held_out import SHARE, Trial, times_expected
from tensorllm.compressors.calibrated.maps import Group, Map, map_shape, stacked
from tensorllm.compressors.layer import LayerContext, OfGiven
from tensorllm.tensors.eigen import leading_subspace
from tensorllm.tensors.factors import wide
from tensorllm.tensors.stacking import is_output_projection
from tensorllm.tensors.unfold import gram_of_columns
from tensorllm.tensors.weighted import (
    Metric,
    Projection,
    at_equal_cost,
    between_roots,
    floor_of,
    left_out,
    left_out_by,
    projection,
    regression,
    through,
)

# Of the width over the tokens that gradients were taken of: what of their covariance is left to the
# plain mean square. Set on a real model with 7 tokens per number of its width: 0.3 there.
SAMPLED = 2.0


class Fit(NamedTuple):
    """A map, and of an output projection what it gives, made of what the original gives."""

    map: Map
    given: OfGiven | None


@dataclass(frozen=True, eq=False)
class AtWidth:
    """Of roles that read one input: what they read or write, and what errors of theirs cost.

    Gradients are sampled, and text is: their covariance, of the order of the width, is noisy. So it
    is drawn towards that of gradients of one size in all directions, by which an error costs its
    plain mean square.

    Attributes:
        metric: E[x xᵀ] of what input projections read; E[g gᵀ] where output projections write.
        seen_DD: E[x xᵀ] of what is read; of output projections E[y yᵀ] of y = W x.
        correction_DD: of what is read, or written, from the compressed model's to the original's.
        plain: share of the plain mean square in what errors cost, 0 to 1; None: `share_of`.
        writes: whether the roles are an output projection.
    """

    metric: Metric
    seen_DD: Tensor
    correction_DD: Tensor | None
    plain: float | None
    writes: bool
    _grams: dict[str, Tensor] = field(default_factory=dict)  # of roles that stand in several sites
    _left: dict[Group, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, context: LayerContext, key: Group, plain: float | None, ridge: float | None = None
    ) -> Self:
        """With a ridge on the compressed model's inputs; without one on the original's."""
        writes, correction_DD = is_output_projection(key[0]), None
        if ridge is not None:
            cross_DD, seen_DD = context.shifted_at_width(key)
            correction_DD = regression(cross_DD, seen_DD, ridge)
        elif writes:
            seen_DD = context.propagated_covariance(key)
        else:
            seen_DD = context.width_covariance(key)
        metric_DD = written(context, key, plain) if writes else seen_DD
        metric = Metric(metric_DD, floor_of(len(metric_DD), context.tokens))
        return cls(metric, seen_DD, correction_DD, plain, writes)

    def propagated(self, context: LayerContext, roles: Group) -> Tensor:
        """The covariance of the side that is not the metric, propagated through the matrices of
        some of the roles to the model's width (D, D)."""
        if self.writes:
            return self.seen_DD
        propagated_DD = context.propagated_covariance(roles)
        share = share_of(context, roles, self.plain)
        if not share:
            return propagated_DD
        plain_DD = reduce(torch.add, [self._plain(context, role) for role in roles])
        return propagated_DD.lerp(plain_DD, share)

    def _plain(self, context: LayerContext, role: str) -> Tensor:
        """Wᵀ W of an input projection, scaled to cost what its propagated covariance does."""
        if role not in self._grams:
            gram_DD = gram_of_columns(wide(context.weight(role))).double()
            propagated_DD = context.propagated_covariance((role,))
            self._grams[role] = at_equal_cost(gram_DD, propagated_DD, self.seen_DD)
        return self._grams[role]

    def left_out(self, context: LayerContext, roles: Group) -> Tensor:
        """(S,): what the best maps of ranks 1 to S, the full one, still cost."""
        if roles not in self._left:
            self._keep(context, roles, self.metric.seen(self.propagated(context, roles)))
        return self._left[roles]

    def _keep(self, context: LayerContext, roles: Group, seen_DD: Tensor) -> None:
        self._left[roles] = left_out(seen_DD, min(map_shape(context.geometry, roles)))

    def tried(self, context: LayerContext, role: str) -> Trial:
        """A map of low rank of one role, tried on text that the covariances have not seen."""
        rank = max(1, min(map_shape(context.geometry, (role,))) // SHARE)
        if not context.holds_out:
            return Trial(float(self.left_out(context, (role,))[rank - 1]), 1.0)
        seen_DD = self.metric.seen(self.propagated(context, (role,)))
        self._keep(context, (role,), seen_DD)
        basis_DR = leading_subspace(seen_DD, rank)
        expected = left_out_by(seen_DD, basis_DR)
        near = self._map(context, (role,), between_roots(self.metric, basis_DR)).map
        applied = Product(Reading(near.right_RX.mT), near.left_MR.mT, self.writes)
        return Trial(expected, times_expected(context, {role: applied}, expected))

    @cached_property
    def _half(self) -> Tensor | None:
        """The root of the metric behind the correction, for all sites of the roles; None: there is
        no correction."""
        correct_DD = self.correction_DD
        if correct_DD is None:
            return None
        return through(self.metric, correct_DD.mT if self.writes else correct_DD)

    def fit(self, context: LayerContext, roles: Group, rank: int) -> Fit:
        """The map of this rank that errs least, its large products in the dtype of the weights."""
        propagated_DD = self.propagated(context, roles)
        return self._map(context, roles, projection(self.metric, propagated_DD, rank, self._half))

    def _map(self, context: LayerContext, roles: Group, between: Projection) -> Fit:
        w_MX = stacked({role: context.weight(role) for role in roles}, roles)
        turn_DR, back_RD = between.into_NR.to(w_MX), between.back_RN.to(w_MX)
        if self.writes:
            return Fit(Map(back_RD.mT, turn_DR.mT @ w_MX), partial(_turned, turn_DR, back_RD))
        return Fit(Map(w_MX @ turn_DR, back_RD), None)


def _turned(turn_DR: Tensor, back_RD: Tensor, given: Tensor) -> Tensor:
    """What was given (..., D), through a map of rank R at the model's width."""
    width, rank = turn_DR.shape
    if 2 * rank < width:
        return given @ turn_DR @ back_RD
    return given @ (turn_DR @ back_RD)


def share_of(context: LayerContext, roles: Group, plain: float | None) -> float:
    """The share of the plain mean square: as given, or `SAMPLED` times width over tokens."""
    if plain is not None:
        return plain
    return min(1.0, SAMPLED * context.geometry.D / max(1, context.gradient_tokens(roles)))


def written(context: LayerContext, roles: Group, plain: float | None) -> Tensor:
    """E[g gᵀ] (D, D) of the gradient where output projections write, drawn towards the identity of
    its mean."""
    gradient_DD = context.width_covariance(roles)
    eye_DD = torch.eye(len(gradient_DD)).to(gradient_DD)
    share = share_of(context, roles, plain)
    return gradient_DD.lerp(gradient_DD.diagonal().mean() * eye_DD, share)
