"""Data-aware low rank: weighted by the inputs of each layer and by the effect on its outputs.

Shapes: M outputs of the stacked maps of a site, X its inputs, R rank, S ranks of a curve.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tensorllm.compressors.allocation import with_whole
from tensorllm.compressors.base import (
    COMPRESSORS,
    ErrorCurve,
    GradientOf,
    Groupings,
    Job,
    LayerFit,
    Needs,
)
from tensorllm.compressors.budget import Budget
from tensorllm.compressors.calibrated.channels import (
    curve,
    fit_channels,
    is_narrowed,
    min_stored,
    narrowed_site,
)
from tensorllm.compressors.calibrated.error_model import ErrorModel, shrunk_gradient_covariance
from tensorllm.compressors.calibrated.held_out import SHARE, mean_ratio
from tensorllm.compressors.calibrated.maps import Group, map_shape, pivoted, site_of
from tensorllm.compressors.calibrated.refit import (
    PASSES_OF_AN_EPOCH,
    PreconditionedMap,
    TrainableSite,
    refit,
)
from tensorllm.compressors.checks import check_seed
from tensorllm.compressors.layer import LayerContext, LayerResult, OutputMap, Site, Size
from tensorllm.compressors.widths import usual_multiple
from tensorllm.errors import UserError
from tensorllm.models.spec import ModelSpec
from tensorllm.registry import one_of
from tensorllm.tensors.factors import Factors
from tensorllm.tensors.kept_rows import kept_rows_outline
from tensorllm.tensors.pivoted import pivoted_outline, pivoted_parameters
from tensorllm.tensors.shared_input import reading_together
from tensorllm.tensors.stacking import ATTENTION_ROLES, FFN, Geometry, is_output_projection

PASSES = 2  # the runs up to each group's input, with their covariances


@COMPRESSORS.register("activation-tucker")
@dataclass(frozen=True, kw_only=True)
class ActivationTucker(LayerFit):
    """Attention fitted to calibration text: matrices that read one input may share a factor.

    Source: truncation-aware whitening is SVD-LLM's (arXiv 2403.07378), the two-sided covariances
    are K-FAC's (arXiv 1503.05671); docs/methods/activation.md describes the combination used here.

    Attributes:
        target_ratio: numbers in the compressed matrices before over after, above 1.
        target_params: instead, the parameters of the whole model afterwards.
        target_bytes: instead, bytes of the weight files; factors and matrices may be rounded.
        max_loss_increase: instead, the allowed increase of the loss on the calibration set in nats
            per token; the smallest model within it is searched for.
        weighting: `outputs` weights errors by their effect on the layer's own output, one layer in
            memory at a time; `loss` by the curvature of the loss (a backward pass through the whole
            model).
        plain: weight of the plain mean squared error of a matrix's outputs in the error measure, 0
            to 1; the rest is weighted by the gradients. None: decreases with the number of tokens
            whose gradients are taken.
        sharing: whether q, k, v (and in, gate) may share input factors where that pays.
        narrowing: whether an FFN may instead lose channels, and so stay a plain FFN, where that
            pays.
        correction: whether layers are fitted on the inputs that the compressed model gives them.
        refit_epochs: with correction, passes over the text in which all factors of a layer are
            trained together towards the original's output of the layer; only this layer runs.
        distill_steps: steps of final training of the factors towards the original's predictions.
        ridge: weight of the original matrix in the correction, relative to the mean squared input.
        rank_multiple: ranks are multiples of it, or 1, where a matrix is not left whole; None:
            `usual_multiple`. Even sizes make kernels up to half as fast again, and fewer kernels
            need compiling.
        seed: of the random vectors or labels for which the gradients are sampled.
    """

    target_ratio: float | None = None
    target_params: int | None = None
    target_bytes: int | None = None
    max_loss_increase: float | None = None
    weighting: GradientOf = "outputs"
    plain: float | None = None
    sharing: bool = True
    narrowing: bool = True
    correction: bool = True
    refit_epochs: int = 4
    distill_steps: int = 0
    ridge: float = 1e-2
    rank_multiple: int | None = None
    seed: int = 0

    source: ClassVar[str] = "https://arxiv.org/abs/2403.07378"
    needs: ClassVar[Needs] = "gradients"
    width_only: ClassVar[bool] = True
    holds_out: ClassVar[bool] = True
    roles: ClassVar[tuple[str, ...]] = ATTENTION_ROLES

    @property
    def training_steps(self) -> int:
        return self.distill_steps

    @property
    def seed_of_fit(self) -> int:
        return self.seed

    def __post_init__(self) -> None:
        _ = self.budget  # raises unless there is exactly one target
        one_of("weighting", self.weighting, ("loss", "outputs"))
        check_seed(self.seed)
        for name in ("refit_epochs", "distill_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.rank_multiple is not None and self.rank_multiple < 1:
            raise UserError(f"rank_multiple must be 1 or more, got {self.rank_multiple}")
        if self.plain is not None and not 0 <= self.plain <= 1:
            raise UserError(f"plain must be in 0..1, got {self.plain}")
        if not self.ridge > 0:
            raise UserError(f"ridge must be above 0, got {self.ridge}")
        for name in ("max_loss_increase", "target_bytes"):
            if getattr(self, name) is not None and self.distill_steps:
                raise UserError(f"give either {name} or distill_steps")

    @property
    def gradient_of(self) -> GradientOf:
        return self.weighting

    @property
    def needs_input_covariances(self) -> bool:
        return not self.correction

    @property
    def budget(self) -> Budget:
        return Budget(
            target_ratio=self.target_ratio,
            target_params=self.target_params,
            target_bytes=self.target_bytes,
            max_loss_increase=self.max_loss_increase,
        )

    def jobs(self, spec: ModelSpec, layers: Sequence[int]) -> list[Job]:
        out = []
        for layer in sorted(layers):
            mine = [role for role in spec.geometry(layer).roles if role in self.roles]
            out += [Job(site_of(layer, together), self) for together in reading_together(mine)]
        return out

    @property
    def full_covariances(self) -> tuple[str, ...]:
        return ("out",) if self.narrowing and "out" in self.roles else ()

    def groupings(self, geometry: Geometry, layer: int, sites: Sequence[Site]) -> list[Groupings]:
        of = {
            site: [
                [Job(site_of(layer, group), self) for group in partition]
                for partition in partitions(site.roles, self.sharing)
            ]
            for site in sites
        }
        narrower = self._narrowed(layer, [role for site in sites for role in site.roles])
        if narrower is None:
            return list(of.values())
        ffn = [site for site in sites if set(site.roles) <= set(narrower.roles)]
        reading, writing = (of[site] for site in ffn)
        together = [[*one, *other] for one in reading for other in writing]
        rest = [groupings for site, groupings in of.items() if site not in ffn]
        return [*rest, [*together, [Job(narrower, self)]]]

    def ffn_channels(self, geometry: Geometry) -> int | None:
        return None if self.full_covariances else geometry.F

    def _narrowed(self, layer: int, roles: Sequence[str]) -> Site | None:
        """The site of an FFN that may lose channels."""
        return narrowed_site(layer, roles) if self.narrowing else None

    def min_parameters(self, spec: ModelSpec, layers: Sequence[int]) -> int:
        """Numbers stored at rank 1 everywhere, with shared factors if allowed."""
        total = 0
        for layer in layers:
            geometry = spec.geometry(layer)
            sites = [job.site for job in self.jobs(spec, [layer])]
            for groupings in self.groupings(geometry, layer, sites):
                total += min(
                    sum(_min_parameters(geometry, job.site) for job in one) for one in groupings
                )
        return total

    def curves(self, sites: Sequence[Site], context: LayerContext) -> dict[Site, ErrorCurve]:
        narrowed = [site for site in sites if is_narrowed(site)]
        found = {
            s: curve(s, context, shrunk_gradient_covariance(context, ("out",), self.plain))
            for s in narrowed
        }
        for key in reading_together([role for site in sites for role in site.roles]):
            here = ErrorModel.of(context, key, self.plain)
            trials = {role: here.trial(context, role) for role in key}
            for site in (site for site in sites if set(site.roles) <= set(key)):
                shape = map_shape(context.geometry, site.roles)
                error_S = here.truncation_errors(context, site.roles)
                error_S = error_S * mean_ratio([trials[role] for role in site.roles])
                ranks = self._ranks(len(error_S))
                cost = [pivoted_parameters(shape, rank) for rank in ranks]
                ranks_S = torch.tensor(ranks)
                found[site] = ErrorCurve(torch.tensor(cost), error_S[ranks_S - 1], ranks_S[:, None])
        return {s: with_whole(one, s.numel(context.geometry)) for s, one in found.items()}

    def outline(self, site: Site, geometry: Geometry, size: Size) -> Factors:
        rows, width = site.shape(geometry)
        if is_narrowed(site):
            return kept_rows_outline(rows, width, size[0] * len(site.roles))
        return pivoted_outline(rows, width, size[0], not is_output_projection(site.roles[0]))

    def example(self, site: Site, context: LayerContext) -> Factors | None:
        if is_narrowed(site):  # rows are kept as they are
            return None
        rank = max(1, min(map_shape(context.geometry, site.roles)) // SHARE)
        fitted = ErrorModel.of(context, site.roles, self.plain).fit(context, site.roles, rank)
        return pivoted(*fitted.map, site.roles)

    def rounding_metric(self, context: LayerContext, role: str) -> Tensor:
        if is_output_projection(role):
            return shrunk_gradient_covariance(context, (role,), self.plain)
        return context.width_covariance((role,))

    def error_of(self, context: LayerContext, role: str, lost_ID: Tensor) -> float:
        """The error on held-out text, as for the curves.

        Without held-out text, tr(E M Eᵀ) at the model's width, times the mean cost of the other
        side: the trace of the propagated covariance over the squared norm of the matrix.
        """
        if context.holds_out:
            return context.held_out_error({role: context.weight(role) + lost_ID})
        metric_DD = context.width_covariance((role,)).to(lost_ID.device)
        propagated_DD = context.propagated_covariance((role,)).to(lost_ID.device)
        w_ID = context.weight(role).float()
        scale = float(propagated_DD.diagonal().sum()) / max(float(w_ID.square().sum()), 1e-30)
        lost_ID = lost_ID.double()
        return scale * float(((lost_ID @ metric_DD) * lost_ID).sum())

    def _ranks(self, full: int) -> list[int]:
        """The ranks that a site may have, ascending."""
        step = self.rank_multiple or usual_multiple(full)
        return list(dict.fromkeys([1, *range(step, full, step)]))  # the full one saves nothing

    def passes(self, sites: Sequence[Site]) -> float:
        refits = self.correction and self.refit_epochs > 0
        return PASSES + (1 + PASSES_OF_AN_EPOCH * self.refit_epochs if refits else 0)

    def fit_layer(self, context: LayerContext) -> LayerResult:
        """Fit each set of roles in the order in which they run, then refit all together."""
        refits = self.correction and self.refit_epochs > 0
        trained: dict[Site, TrainableSite] = {}
        factors: dict[Site, Factors] = {}
        output_maps: dict[Site, OutputMap | None] = {}
        for key in reading_together([role for site in context.sites for role in site.roles]):
            sites = {s: size for s, size in context.sites.items() if s.roles[0] in key}
            if not sites:
                continue
            here = ErrorModel.of(context, key, self.plain, self.ridge if self.correction else None)
            for site, size in sites.items():
                assert size is not None, "a budget gives every site its size"
                if is_narrowed(site):
                    channels = fit_channels(context, site, size[0], here)
                    factors[site] = channels.factors()
                    if refits:
                        trained[site] = channels.balanced()
                    continue
                fitted = here.fit(context, site.roles, size[0])
                factors[site] = pivoted(*fitted.map, site.roles)
                output_maps[site] = fitted.output_map
                if refits:
                    trained[site] = PreconditionedMap(fitted.map, here.metric, site.roles)
            for site in sites:
                context.replace(site, factors[site], output_maps.get(site))
        if refits:
            return refit(context, trained, factors, self.refit_epochs)
        return LayerResult(factors)


@COMPRESSORS.register("activation-hybrid")
@dataclass(frozen=True, kw_only=True)
class ActivationHybrid(ActivationTucker):
    """Attention and FFN fitted to calibration text, out of one budget."""

    roles: ClassVar[tuple[str, ...]] = ATTENTION_ROLES + FFN


def _min_parameters(geometry: Geometry, site: Site) -> int:
    """Numbers that a site stores at its smallest size."""
    if is_narrowed(site):
        return min_stored(geometry, site)
    return pivoted_parameters(map_shape(geometry, site.roles), 1)


def partitions(roles: Group, sharing: bool) -> list[list[Group]]:
    """All partitions of roles that read one input; without sharing, each role alone."""
    if not sharing:
        return [[(role,) for role in roles]]
    out: list[list[Group]] = [[]]
    for role in roles:
        out = [
            new
            for old in out
            for new in (
                [*old, (role,)],
                *([*old[:i], (*old[i], role), *old[i + 1 :]] for i in range(len(old))),
            )
        ]
    return out
