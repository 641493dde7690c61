"""The cost of errors of a layer's matrices, from covariances (D, D), and the best low-rank maps.

Shapes: D model width, M outputs of the stacked maps of a site, R rank, S ranks 1 to the full one.
"""

from dataclasses import dataclass, field
from functools import cached_property, partial, reduce
from typing import NamedTuple, Self

import torch
from torch import Tensor

from tensorllm.compressors.calibrated.held_out import SHARE, Trial, error_ratio
from tensorllm.compressors.calibrated.maps import Group, Map, map_shape, stacked
from tensorllm.compressors.layer import LayerContext, OutputMap
from tensorllm.compressors.operators import ProductOperator, SharedInput
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
    projection,
    projection_error,
    regression,
    truncation_errors,
)

# Default shrinkage times tokens over width. Chosen on a real model with gradients of 7 tokens per
# unit of width, where it gives 0.3.
SHRINKAGE = 2.0


class Fit(NamedTuple):
    """A low-rank map; for an output projection also the map from the original's outputs."""

    map: Map
    output_map: OutputMap | None


@dataclass(frozen=True, eq=False)
class ErrorModel:
    """The cost of errors of roles that read the same input.

    An error E of a map costs tr(E A Eᵀ B), with A the covariance of the inputs and B that of the
    gradients at the outputs. Gradients are sampled, and so is text, so B is noisy. It is shrunk
    towards a multiple of the identity, by which an error costs its mean square
    (docs/methods/activation.md, section 1).

    Attributes:
        metric: E[x xᵀ] of what input projections read; E[g gᵀ] of the gradient at the output of
            output projections.
        data_DD: E[x xᵀ] of the inputs of input projections; E[y yᵀ] of y = W x for output
            projections.
        correction_DD: the linear map from the compressed model's inputs (or outputs) to the
            original's; None: no correction.
        plain: the shrinkage, 0 to 1; None: chosen by `shrinkage`.
        writes: whether the roles are an output projection.
    """

    metric: Metric
    data_DD: Tensor
    correction_DD: Tensor | None
    plain: float | None
    writes: bool
    _grams: dict[str, Tensor] = field(default_factory=dict)  # a role is in several sites
    _errors: dict[Group, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, context: LayerContext, key: Group, plain: float | None, ridge: float | None = None
    ) -> Self:
        """With a ridge, on the compressed model's inputs; without, on the original's."""
        writes, correction_DD = is_output_projection(key[0]), None
        if ridge is not None:
            cross_DD, data_DD = context.shifted_width_covariances(key)
            correction_DD = regression(cross_DD, data_DD, ridge)
        elif writes:
            data_DD = context.propagated_covariance(key)
        else:
            data_DD = context.width_covariance(key)
        metric_DD = shrunk_gradient_covariance(context, key, plain) if writes else data_DD
        metric = Metric(metric_DD, floor_of(len(metric_DD), context.tokens))
        return cls(metric, data_DD, correction_DD, plain, writes)

    def propagated(self, context: LayerContext, roles: Group) -> Tensor:
        """The other side's covariance, propagated through roles to the model's width (D, D)."""
        if self.writes:
            return self.data_DD
        propagated_DD = context.propagated_covariance(roles)
        share = shrinkage(context, roles, self.plain)
        if not share:
            return propagated_DD
        plain_DD = reduce(torch.add, [self._plain(context, role) for role in roles])
        return propagated_DD.lerp(plain_DD, share)

    def _plain(self, context: LayerContext, role: str) -> Tensor:
        """Wᵀ W of an input projection, scaled to the cost of its propagated covariance."""
        if role not in self._grams:
            gram_DD = gram_of_columns(wide(context.weight(role))).double()
            propagated_DD = context.propagated_covariance((role,))
            self._grams[role] = at_equal_cost(gram_DD, propagated_DD, self.data_DD)
        return self._grams[role]

    def truncation_errors(self, context: LayerContext, roles: Group) -> Tensor:
        """The errors (S,) of the best maps of ranks 1 to S, the full rank."""
        if roles not in self._errors:
            self._keep(context, roles, self.metric.weighted(self.propagated(context, roles)))
        return self._errors[roles]

    def _keep(self, context: LayerContext, roles: Group, weighted_DD: Tensor) -> None:
        full = min(map_shape(context.geometry, roles))
        self._errors[roles] = truncation_errors(weighted_DD, full)

    def trial(self, context: LayerContext, role: str) -> Trial:
        """The predicted and measured error of a low-rank map of one role, on held-out text."""
        rank = max(1, min(map_shape(context.geometry, (role,))) // SHARE)
        if not context.holds_out:
            return Trial(float(self.truncation_errors(context, (role,))[rank - 1]), 1.0)
        weighted_DD = self.metric.weighted(self.propagated(context, (role,)))
        self._keep(context, (role,), weighted_DD)
        basis_DR = leading_subspace(weighted_DD, rank)
        predicted = projection_error(weighted_DD, basis_DR)
        near = self._fit(context, (role,), between_roots(self.metric, basis_DR)).map
        product = ProductOperator(SharedInput(near.right_RX.mT), near.left_MR.mT, self.writes)
        return Trial(predicted, error_ratio(context, {role: product}, predicted))

    @cached_property
    def _corrected_root(self) -> Tensor | None:
        """The correction times the metric's root, the same for all sites; None: no correction."""
        correct_DD = self.correction_DD
        if correct_DD is None:
            return None
        return self.metric.times_root(correct_DD.mT if self.writes else correct_DD)

    def fit(self, context: LayerContext, roles: Group, rank: int) -> Fit:
        """The map of this rank with the least error; large products in the dtype of the weights."""
        propagated_DD, root_DD = self.propagated(context, roles), self._corrected_root
        return self._fit(context, roles, projection(self.metric, propagated_DD, rank, root_DD))

    def _fit(self, context: LayerContext, roles: Group, found: Projection) -> Fit:
        w_MX = stacked({role: context.weight(role) for role in roles}, roles)
        into_DR, back_RD = found.into_NR.to(w_MX), found.back_RN.to(w_MX)
        if self.writes:
            return Fit(Map(back_RD.mT, into_DR.mT @ w_MX), partial(_projected, into_DR, back_RD))
        return Fit(Map(w_MX @ into_DR, back_RD), None)


def _projected(into_DR: Tensor, back_RD: Tensor, y: Tensor) -> Tensor:
    """Outputs y (..., D) times `into_DR @ back_RD`, in the cheaper order."""
    width, rank = into_DR.shape
    if 2 * rank < width:
        return y @ into_DR @ back_RD
    return y @ (into_DR @ back_RD)


def shrinkage(context: LayerContext, roles: Group, plain: float | None) -> float:
    """The shrinkage of B, 0 to 1: as given, or `SHRINKAGE` times width over tokens."""
    if plain is not None:
        return plain
    return min(1.0, SHRINKAGE * context.geometry.D / max(1, context.gradient_tokens(roles)))


def shrunk_gradient_covariance(context: LayerContext, roles: Group, plain: float | None) -> Tensor:
    """E[g gᵀ] (D, D) at the output of output projections, shrunk to its mean eigenvalue."""
    gradient_DD = context.width_covariance(roles)
    eye_DD = torch.eye(len(gradient_DD)).to(gradient_DD)
    share = shrinkage(context, roles, plain)
    return gradient_DD.lerp(gradient_DD.diagonal().mean() * eye_DD, share)
