"""Joint refit of all factors of a layer, so that the layer's own output is nearest.

Each site was fitted alone, by an error measure that takes the rest of the layer as fixed. Here they
are trained together: Adam on minibatches, in coordinates in which all directions of the factor at
the model's width cost about the same. Only this one layer runs.

Shapes: W the wide side of a map, D the model's width, M outputs, X inputs, R rank.
"""

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from tensorllm.compressors.calibrated.maps import Map, pivoted
from tensorllm.compressors.layer import LayerContext, LayerResult, Site
from tensorllm.compressors.operators import LinearOperator, ProductOperator, SharedInput
from tensorllm.compressors.steps import damp_rounding, mean_size, warmed_up
from tensorllm.tensors.factors import Factors
from tensorllm.tensors.stacking import ATTENTION_ROLES, Geometry, is_output_projection
from tensorllm.tensors.triangular import lower_inverse
from tensorllm.tensors.weighted import Metric

DAMPING = 1e-2  # of the mean variance: bounds steps along directions that cost nothing
SMALLEST = 1e-3  # size of a component relative to the largest, for the same reason
LEARNING_RATE = 0.03  # relative to a parameter's mean size, times the relative error of the layer's
# output: if that is small, longer steps increase it
TOGETHER = 0.75  # share of the epochs; then the FFN is trained alone, without attention
HELD_OUT = 8  # one batch in so many is held out, to choose the best epoch
PASSES_OF_AN_EPOCH = 2.9  # forward, backward for inputs and weights, steps; held out: forward


class TrainableSite(nn.Module):
    """The factors of a site as parameters."""

    @abstractmethod
    def operators(self, geometry: Geometry) -> dict[str, LinearOperator]:
        """The role matrices that the parameters stand for."""

    @abstractmethod
    def factors(self) -> Factors:
        """The factors in their stored form."""


class PreconditionedMap(TrainableSite):
    """A map `wide diag(1/size) narrow L⁻¹` (or its transpose), L the root of the metric at D.

    Each parameter contains the size of a component, and the size is divided out once in between. So
    a small step of either costs the square of its length, whichever component it changes.
    """

    def __init__(self, map_: Map, metric: Metric, roles: tuple[str, ...]) -> None:
        super().__init__()
        self.roles, self.writes = roles, is_output_projection(roles[0])
        wide_WR, narrow_RD = (map_.right_RX.mT, map_.left_MR.mT) if self.writes else map_
        root_DD = Metric(metric.covariance_NN, DAMPING).root
        self.inverse_DD = lower_inverse(root_DD).to(wide_WR)
        narrow_RD = narrow_RD @ root_DD.to(narrow_RD)
        tall_R, long_R = wide_WR.norm(dim=0), narrow_RD.norm(dim=1)
        size_R = tall_R * long_R
        self.size_R = size_R.clamp(min=SMALLEST * float(size_R.max()) + 1e-30)
        self.wide_WR = nn.Parameter(wide_WR * (self.size_R / tall_R.clamp(min=1e-30)))
        self.narrow_RD = nn.Parameter(narrow_RD * tall_R[:, None])

    def operators(self, geometry: Geometry) -> dict[str, LinearOperator]:
        left_MR, right_RX = self.map()
        shared = SharedInput(right_RX.mT)
        rows = [geometry.outputs(role) for role in self.roles]
        parts = [left_MR] if self.writes else left_MR.split(rows)
        return {
            role: ProductOperator(shared, part_YR.mT, self.writes)
            for role, part_YR in zip(self.roles, parts, strict=True)
        }

    def factors(self) -> Factors:
        left_MR, right_RX = self.map()
        return pivoted(left_MR.detach(), right_RX.detach(), self.roles)

    def map(self) -> Map:
        """The map from inputs to outputs."""
        wide_WR = self.wide_WR / self.size_R
        narrow_RD = self.narrow_RD @ self.inverse_DD
        return Map(narrow_RD.mT, wide_WR.mT) if self.writes else Map(wide_WR, narrow_RD)


def refit(
    context: LayerContext,
    trained: Mapping[Site, TrainableSite],
    before: Mapping[Site, Factors],
    epochs: int,
) -> LayerResult:
    """The factors of the best epoch on held-out batches; the old ones if none is better.

    They replace the layer's matrices too. On a short text, further epochs keep improving on the
    training batches but not on other text. With fewer than `HELD_OUT` batches, all are used for
    both.

    Args:
        context: the compressed layer, with the factors as they were fitted.
        trained: those factors, to be trained.
        before: the same, in their stored form.
        epochs: passes over the text.
    """
    ends = _ends(trained, epochs)
    if not _train(context, trained, ends):
        for site, end in ends.items():
            if end < epochs:  # it was replaced after its last epoch
                context.replace(site, before[site])
        return LayerResult(before)
    out = {site: each.factors() for site, each in trained.items()}
    for site, factors in out.items():
        context.replace(site, factors)
    return LayerResult(out)


def _ends(sites: Iterable[Site], epochs: int) -> dict[Site, int]:
    """The number of epochs for which each site is trained: fewer for attention beside an FFN."""
    attention = {site: bool(set(site.roles) & set(ATTENTION_ROLES)) for site in sites}
    first = epochs if all(attention.values()) else math.ceil(TOGETHER * epochs)
    return {site: first if is_of_it else epochs for site, is_of_it in attention.items()}


def _train(
    context: LayerContext, trained: Mapping[Site, TrainableSite], ends: Mapping[Site, int]
) -> bool:
    """Train all sites with Adam; a site that has ended is replaced in the layer.

    Leaves the parameters of the best epoch; returns whether any is better than the start.
    """
    held = list(range(0, context.batches, HELD_OUT)) if context.batches >= HELD_OUT else []
    rest = [batch for batch in range(context.batches) if batch not in held]
    judged = held or rest
    start = error = _error(context, trained, judged)
    rate = LEARNING_RATE * math.sqrt(start * context.batches / len(judged))
    groups: list[dict[str, Any]] = []
    rates: list[Callable[[int], float]] = []
    for site, each in trained.items():
        for p in each.parameters():
            groups.append({"params": [p], "lr": rate * mean_size(p)})
            rates.append(partial(warmed_up, steps=ends[site] * len(rest)))
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
    draws = torch.Generator().manual_seed(context.layer)
    best = copy.deepcopy([each.state_dict() for each in trained.values()])
    for epoch in range(max(ends.values())):
        now = {site: each for site, each in trained.items() if epoch < ends[site]}
        for site in (site for site, end in ends.items() if epoch == end):
            context.replace(site, trained[site].factors())
        for place in torch.randperm(len(rest), generator=draws).tolist():
            optimizer.zero_grad()
            with torch.enable_grad():
                context.output_loss(rest[place], _operators(context, now), {}).backward()
            grads = [p.grad for each in now.values() for p in each.parameters()]
            context.all_reduce([grad for grad in grads if grad is not None])
            if not schedule.last_epoch:
                damp_rounding(optimizer)
            optimizer.step()
            schedule.step()
        found = _error(context, now, judged)
        if found < error:
            error = found
            best = copy.deepcopy([each.state_dict() for each in trained.values()])
    for each, state in zip(trained.values(), best, strict=True):
        each.load_state_dict(state)
    return error < start


def _operators(
    context: LayerContext, trained: Mapping[Site, TrainableSite]
) -> dict[str, LinearOperator]:
    """The operators of all their role matrices."""
    out: dict[str, LinearOperator] = {}
    for each in trained.values():
        out |= each.operators(context.geometry)
    return out


@torch.no_grad()
def _error(
    context: LayerContext, trained: Mapping[Site, TrainableSite], batches: Sequence[int]
) -> float:
    """The error of the layer's output over some batches, summed over all processes."""
    operators = _operators(context, trained)
    total = sum(context.output_loss(batch, operators, {}).double() for batch in batches)
    assert isinstance(total, torch.Tensor)
    context.all_reduce([total])
    return float(total)
