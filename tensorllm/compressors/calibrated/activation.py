"""Data-aware low rank: fitted to what the layers read and to what errors do to their outputs.

Shapes: M outputs of the stacked maps of a site, X its inputs, R rank, S ranks of a curve.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tensorllm.compressors.base import (
    COMPRESSORS,
    ErrorCurve,
    GradientOf,
    Job,
    LayerContext,
    LayerFit,
    LayerResult,
    Needs,
    Site,
    Ways,
)
from tensorllm.compressors.budget import Budget
from tensorllm.compressors.calibrated.maps import Group, map_shape, pivoted, site_of, stacked
from tensorllm.compressors.calibrated.refit import refit
from tensorllm.compressors.checks import check_seed
from tensorllm.errors import UserError
from tensorllm.models.spec import ModelSpec
from tensorllm.registry import one_of
from tensorllm.tensors.pivoted import PivotedLowRank, pivoted_parameters
from tensorllm.tensors.shared_input import reading_together
from tensorllm.tensors.stacking import ATTENTION_ROLES, FFN, Geometry, is_output_projection
from tensorllm.tensors.weighted import Metric, left_out, regression, weighted_svd


@COMPRESSORS.register("activation-tucker")
@dataclass(frozen=True, kw_only=True)
class ActivationTucker(LayerFit):
    """Attention fitted to calibration text: matrices that read one input may share a factor.

    Source: truncation-aware whitening is SVD-LLM's (arXiv 2403.07378), the two-sided covariances
    are K-FAC's (arXiv 1503.05671); docs/methods/activation.md says what is put together here.

    Attributes:
        target_ratio: numbers in the compressed matrices before over after, above 1.
        target_params: instead, the parameters of the whole model afterwards.
        max_loss_increase: instead, nats per token that the loss on the calibration text may rise;
            the smallest model within it is searched for.
        weighting: `outputs` weights errors by what they do to their own layer's output, one layer
            in memory at a time; `loss` by the loss's curvature (the whole model, backwards).
        sharing: whether q, k, v (and in, gate) may share input factors where that pays.
        correction: whether layers are fitted on the inputs that the compressed model gives them.
        refit_steps: with correction, passes forward and backward through each layer alone in which
            all its factors move together towards the original's output of the layer.
        distill_steps: afterwards, of a training of the factors towards the original's predictions.
        ridge: weight of the original matrix in the correction, of the mean squared input.
        seed: of the random vectors or labels that the gradients are sampled with.
    """

    target_ratio: float | None = None
    target_params: int | None = None
    max_loss_increase: float | None = None
    weighting: GradientOf = "outputs"
    sharing: bool = True
    correction: bool = True
    refit_steps: int = 12
    distill_steps: int = 0
    ridge: float = 1e-2
    seed: int = 0

    source: ClassVar[str] = "https://arxiv.org/abs/2403.07378"
    needs: ClassVar[Needs] = "gradients"
    roles: ClassVar[tuple[str, ...]] = ATTENTION_ROLES

    def __post_init__(self) -> None:
        _ = self.budget  # refused now where there is none or more than one
        one_of("weighting", self.weighting, ("loss", "outputs"))
        check_seed(self.seed)
        for name in ("refit_steps", "distill_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not self.ridge > 0:
            raise UserError(f"ridge must be above 0, got {self.ridge}")
        if self.max_loss_increase is not None and self.distill_steps:
            raise UserError("give either max_loss_increase or distill_steps")

    @property
    def gradient_of(self) -> GradientOf:
        return self.weighting

    @property
    def budget(self) -> Budget:
        return Budget(
            target_ratio=self.target_ratio,
            target_params=self.target_params,
            max_loss_increase=self.max_loss_increase,
        )

    def jobs(self, spec: ModelSpec, layers: Sequence[int]) -> list[Job]:
        out = []
        for layer in sorted(layers):
            mine = [role for role in spec.geometry(layer).roles if role in self.roles]
            out += [Job(site_of(layer, together), self) for together in reading_together(mine)]
        return out

    def ways(self, geometry: Geometry, layer: int, sites: Sequence[Site]) -> list[Ways]:
        return [
            [[Job(site_of(layer, group), self) for group in way] for way in ways]
            for ways in (groupings(site.roles, self.sharing) for site in sites)
        ]

    def least_parameters(self, spec: ModelSpec, layers: Sequence[int]) -> int:
        """Rank 1 everywhere, for all roles that read one input together if allowed."""
        total = 0
        for job in self.jobs(spec, layers):
            geometry = spec.geometry(job.site.layers[0])
            groups = groupings(job.site.roles, self.sharing)[-1 if self.sharing else 0]
            total += sum(pivoted_parameters(map_shape(geometry, group), 1) for group in groups)
        return total

    def curves(self, sites: Sequence[Site], context: LayerContext) -> dict[Site, ErrorCurve]:
        out = {}
        for key in reading_together([role for site in sites for role in site.roles]):
            inputs = Metric(context.input_covariance(key[0]))
            for site in (site for site in sites if set(site.roles) <= set(key)):
                w_MX, outputs = _map(context, site.roles), _outputs(context, site.roles)
                if is_output_projection(site.roles[0]):
                    error_S = left_out(w_MX.mT, inputs, outputs)
                else:
                    error_S = left_out(w_MX, outputs, inputs)
                ranks = torch.arange(1, len(error_S) + 1)
                shape = map_shape(context.geometry, site.roles)
                cost = [pivoted_parameters(shape, rank) for rank in ranks.tolist()]
                out[site] = ErrorCurve(torch.tensor(cost), error_S.cpu(), ranks[:, None])
        return out

    def passes(self, sites: Sequence[Site]) -> int:
        return len(reading_together([r for site in sites for r in site.roles])) + self.refit_steps

    def fit_layer(self, context: LayerContext) -> LayerResult:
        """Each set of roles in the order in which they run, then all together."""
        fitted: dict[Site, PivotedLowRank] = {}
        for key in reading_together([role for site in context.sites for role in site.roles]):
            sites = {s: size for s, size in context.sites.items() if set(s.roles) <= set(key)}
            if self.correction:
                cross_XX, seen_XX = context.shifted_covariances(key[0])
                inputs = Metric(seen_XX)
            else:
                inputs = Metric(context.input_covariance(key[0]))
            for site, size in sites.items():
                w_MX = _map(context, site.roles)
                if self.correction:
                    w_MX = regression(w_MX @ cross_XX, seen_XX, w_MX, self.ridge)
                assert size is not None, "a budget gives every site its size"
                svd = weighted_svd(w_MX, _outputs(context, site.roles), inputs)
                fitted[site] = pivoted(*svd.truncate(size[0]), site.roles)
            for site in sites:
                context.put(site, fitted[site])
        if self.correction and self.refit_steps:
            inputs_of = {s: Metric(context.input_covariance(s.roles[0])) for s in fitted}
            metrics = {s: (_outputs(context, s.roles), inputs_of[s]) for s in fitted}
            return LayerResult(refit(context, fitted, metrics, self.refit_steps))
        return LayerResult(fitted)


@COMPRESSORS.register("activation-hybrid")
@dataclass(frozen=True, kw_only=True)
class ActivationHybrid(ActivationTucker):
    """Attention and FFN fitted to calibration text, out of one budget."""

    roles: ClassVar[tuple[str, ...]] = ATTENTION_ROLES + FFN


def groupings(roles: Group, sharing: bool) -> list[list[Group]]:
    """All ways to group roles that read one input; without sharing each role alone."""
    if not sharing:
        return [[(role,) for role in roles]]
    ways: list[list[Group]] = [[]]
    for role in roles:
        ways = [
            new
            for way in ways
            for new in (
                [*way, (role,)],
                *([*way[:i], (*way[i], role), *way[i + 1 :]] for i in range(len(way))),
            )
        ]
    return ways


def _map(context: LayerContext, roles: Group) -> Tensor:
    return stacked({role: context.weight(role) for role in roles}, roles)


def _outputs(context: LayerContext, roles: Group) -> Metric:
    return Metric(context.gradient_covariance(roles))
