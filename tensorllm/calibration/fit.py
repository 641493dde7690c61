"""Fitting factors to text: measure, share out the budget, fit layer after layer, measure again.

Shapes: I rows of a site's tensor, O its columns, M outputs of a cluster, X width of its input,
N tokens of a batch.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensorllm.architectures import RoleMatrices, parameters_of
from tensorllm.calibration.blocks import Blocks
from tensorllm.calibration.groups import (
    Group,
    Key,
    Ranks,
    groupings,
    input_width,
    output_width,
    ranks_of,
    site_of,
)
from tensorllm.calibration.moments import Moments, Progress, measure, quiet
from tensorllm.calibration.sequences import Batch, Calibration
from tensorllm.compressors import ActivationTucker, Job
from tensorllm.compressors.activation import Given
from tensorllm.errors import UserError
from tensorllm.tensors.allocation import Curve, allocate
from tensorllm.tensors.factors import Factors, cast
from tensorllm.tensors.pivoted import pivot, pivoted_parameters
from tensorllm.tensors.weighted import WeightedSVD, regression, weighted_svd


def fit(
    compressor: ActivationTucker,
    model: nn.Module,
    calibration: Calibration,
    layers: Sequence[int] | None = None,
    *,
    moments: Moments | None = None,
    spill: Path | None = None,
    progress: Progress = quiet,
) -> ActivationTucker:
    """The strategy fitted to a model and a text; `compress` and `compress_folder` then take it.

    Args:
        model: stays as it is.
        layers: counted from 0; all layers by default, and the same as are compressed then.
        moments: those of this model and text, where they were measured before.
        spill: a folder for the moments, where memory is short.

    Raises:
        UserError: text too short or not the model's, an unreachable target, activations that are
            not finite.
    """
    roles = RoleMatrices(model.config, parameters_of(model))
    chosen = roles.check_layers(range(roles.layers) if layers is None else layers)
    work = _Fit(compressor, model, roles, sorted(chosen), calibration, spill, progress)
    return compressor.with_fit(work.run(moments), calibration.facts())


def measure_for(
    compressor: ActivationTucker, model: nn.Module, calibration: Calibration
) -> Moments:
    """The moments of all layers that `fit` wants, to be used for several targets."""
    roles = RoleMatrices(model.config, parameters_of(model))
    layers = list(range(roles.layers))
    return _Fit(compressor, model, roles, layers, calibration, None, quiet).measure(model, 0)


class _Fit:
    """One fit: what stays the same from round to round."""

    def __init__(
        self,
        compressor: ActivationTucker,
        model: nn.Module,
        roles: RoleMatrices,
        layers: list[int],
        calibration: Calibration,
        spill: Path | None,
        progress: Progress,
    ) -> None:
        self.compressor, self.model, self.roles, self.layers = compressor, model, roles, layers
        self.spill, self.progress = spill, progress
        self.weights = parameters_of(model)
        clusters = compressor.clusters(roles.geometry)
        self.keys: list[Key] = [(layer, cluster) for layer in layers for cluster in clusters]
        widest = max(input_width(roles.geometry, cluster[0]) for cluster in clusters)
        calibration.check(model.config.vocab_size, widest)  # type: ignore[union-attr,arg-type]
        self.batches: list[Batch] = calibration.batches()

    def run(self, first: Moments | None) -> list[Job]:
        first = first or self.measure(self.model, 0)
        factors = self.factors(first)
        for number in range(1, self.compressor.rounds + 1):
            smaller = copy.deepcopy(self.model)
            self.write(factors, parameters_of(smaller))
            factors = self.factors(first.mean_with(self.measure(smaller, number)))
        return [
            Job(site_of(layer, group), Given(factors=f)) for (layer, group), f in factors.items()
        ]

    def measure(self, model: nn.Module, number: int) -> Moments:
        priced = self.compressor.weighting == "loss"
        moments = measure(
            model,
            self.keys,
            self.batches,
            gradients=priced,
            seed=self.compressor.seed,
            spill=None if self.spill is None else self.spill / f"round-{number}",
            progress=self.progress,
        )
        if priced:
            return moments
        scaled = {}  # errors relative to the size of the outputs, so that they can be compared
        for key, price in moments.gradients.items():
            w_MX = torch.cat([self.matrix(key[0], role) for role in key[1]])
            size = float(((w_MX @ moments.inputs[key]) * w_MX).sum())
            scaled[key] = price / size if size > 0 else price
        return Moments(moments.inputs, scaled)

    def matrix(self, layer: int, role: str, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The map from inputs to outputs (M, X), float64."""
        w_ID = self.roles.read(weights or self.weights, layer, role).double()
        return w_ID.mT if role in ("o", "out") else w_ID

    def factors(self, moments: Moments) -> dict[tuple[int, Group], Factors]:
        """Sizes from the budget, then factors by layers."""
        ranks = self.sizes(moments)
        if self.compressor.correction:
            return self.corrected(moments, ranks)
        return {
            at: _factors(_decompose(self.stacked(*at), at[1], *self.prices(moments, *at)), rank)
            for at, rank in ranks.items()
        }

    def stacked(self, layer: int, group: Group) -> Tensor:
        return torch.cat([self.matrix(layer, role) for role in group])

    def prices(self, moments: Moments, layer: int, group: Group) -> tuple[Tensor, Tensor]:
        """The second moments of the group's input and of its outputs' gradients."""
        key = next(k for k in self.keys if k[0] == layer and group[0] in k[1])
        geometry = self.roles.geometry
        ends = [0, *accumulate(output_width(geometry, role) for role in key[1])]
        rows = torch.cat([torch.arange(*ends[i : i + 2]) for i in map(key[1].index, group)])
        return moments.inputs[key], moments.gradients[key][rows][:, rows]

    def sizes(self, moments: Moments) -> Ranks:
        """The ranks of all groups, and which roles are grouped, out of one budget."""
        ways = [groupings(cluster, self.compressor.sharing) for _, cluster in self.keys]
        clusters = [
            [[self.curve(moments, layer, group) for group in way] for way in ways_here]
            for (layer, _), ways_here in zip(self.keys, ways, strict=True)
        ]
        choices = allocate(clusters, self.budget())
        return ranks_of(self.keys, ways, choices)

    def curve(self, moments: Moments, layer: int, group: Group) -> Curve:
        w_MX = self.stacked(layer, group)
        found = _decompose(w_MX, group, *self.prices(moments, layer, group))
        shape = (found.left_IS.shape[0], found.right_SO.shape[1])
        costs = [pivoted_parameters(shape, r) for r in range(1, len(found.singular_S) + 1)]
        return Curve(torch.tensor(costs), found.errors())

    def budget(self) -> int:
        """How many numbers the factors may hold in all."""
        sizes = [self.matrix(layer, role).numel() for layer, roles in self.keys for role in roles]
        if self.compressor.target_ratio is not None:
            return int(sum(sizes) / self.compressor.target_ratio)
        assert self.compressor.target_params is not None
        rest = sum(p.numel() for p in self.model.parameters()) - sum(sizes)
        if self.compressor.target_params <= rest:
            raise UserError(
                f"target_params must be above {rest}, the parameters that this mode does not "
                f"touch, got {self.compressor.target_params}"
            )
        return self.compressor.target_params - rest

    def corrected(self, moments: Moments, ranks: Ranks) -> dict[tuple[int, Group], Factors]:
        """Each layer fitted on the inputs that the compressed ones below give it."""
        blocks = Blocks(self.model, self.roles, self.batches)
        ours = theirs = list(blocks.start)
        out: dict[tuple[int, Group], Factors] = {}
        for layer in range(self.layers[-1] + 1):
            self.progress(layer, self.layers[-1] + 1, "fitting layers")
            block, weights = blocks.copy(layer)
            keys = [key for key in self.keys if key[0] == layer]
            paths = {key: self.roles.architecture.stored(key[1][0]).path for key in keys}
            theirs, inputs = blocks.run_watched(layer, theirs, sorted(paths.values()))
            for key in keys:
                now = blocks.inputs(layer, block, ours, paths[key])
                cross_XX, seen_XX = _second_moments(inputs[paths[key]], now)
                for group in [g for at, g in ranks if at == layer and set(g) <= set(key[1])]:
                    w_MX = self.stacked(layer, group)
                    target_MX = regression(w_MX @ cross_XX, seen_XX, w_MX, self.compressor.ridge)
                    price_MM = self.prices(moments, layer, group)[1]
                    found = _decompose(target_MX, group, seen_XX, price_MM)
                    out[layer, group] = _factors(found, ranks[layer, group])
                    self.write({(layer, group): out[layer, group]}, weights)
            if layer < self.layers[-1]:
                ours = list(blocks.run(layer, block, ours))
        return out

    def write(
        self, factors: Mapping[tuple[int, Group], Factors], weights: dict[str, Tensor]
    ) -> None:
        """Put what the factors stand for, in the dtype they are stored in, into `weights`."""
        for (layer, group), found in factors.items():
            site = site_of(layer, group)
            dtype = weights[self.roles.name(layer, group[0])].dtype
            parts = site.unstack(cast(found, dtype).dense(), self.roles.geometry)
            for role, w_ID in zip(group, parts, strict=True):
                self.roles.write(weights, layer, role, w_ID)


def _second_moments(x: Sequence[Tensor], y: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """E[x yᵀ] and E[y yᵀ] over all tokens, float64; x and y are (N, X) per batch."""
    width, tokens = x[0].shape[1], sum(map(len, x))
    cross_XX = torch.zeros(width, width, dtype=torch.float64)
    seen_XX = torch.zeros_like(cross_XX)
    for x_NX, y_NX in zip(x, y, strict=True):
        y_NX = y_NX.double()
        cross_XX += (x_NX.double().mT @ y_NX).cpu()
        seen_XX += (y_NX.mT @ y_NX).cpu()
    return cross_XX / tokens, seen_XX / tokens


def _decompose(w_MX: Tensor, group: Group, inputs_XX: Tensor, prices_MM: Tensor) -> WeightedSVD:
    """The weighted SVD of the site's tensor; o and out are stacked transposed, (X, M)."""
    if group[0] in ("o", "out"):
        return weighted_svd(w_MX.mT, inputs_XX, prices_MM)
    return weighted_svd(w_MX, prices_MM, inputs_XX)


def _factors(found: WeightedSVD, rank: int) -> Factors:
    factors: Any = pivot(*found.truncate(rank))
    return cast(factors, torch.float32)
