"""All experts of a layer as one tensor: a Tucker decomposition that they share.

Shapes: E experts, F their inner width, D model width, S matrices of each expert, N sizes of a
curve.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from tensorllm.compressors.base import COMPRESSORS, Dimension, ErrorCurve, Job, Leaf, Needs
from tensorllm.compressors.checks import check_roles
from tensorllm.compressors.layer import MatrixStatistics, Site, Size
from tensorllm.compressors.matrix import KEPT
from tensorllm.errors import UserError
from tensorllm.models.spec import ModelSpec
from tensorllm.options import Value
from tensorllm.registry import one_of
from tensorllm.tensors.experts import (
    FLOOR,
    INNER,
    WIDTH,
    Roots,
    ranks_within,
    refitted,
    root_of,
    size_curve,
    stored_numbers,
    weighted_tucker,
)
from tensorllm.tensors.factors import Factors, Tucker
from tensorllm.tensors.stacking import ROUTED, Geometry
from tensorllm.tensors.tucker import tucker_outline

MODES = ("experts", "inner", "width", "matrices")
STACKED = ("inputs", "all", "none")
# Added to the variance of every input direction, relative to the mean: a factor shared by all
# experts should not be spent on the few directions in which the text varies most.
RIDGE = 1.0
UNREACHED = 0.01  # weight of an expert without tokens, relative to the mean expert
PRIOR = 1.0  # tokens of the layer's average added to an expert's own, per unit of width


@COMPRESSORS.register("expert-tucker")
@dataclass(frozen=True, kw_only=True)
class ExpertTucker(Leaf):
    """The experts of a layer as one Tucker tensor (experts, inner width, model width, matrices).

    Source: TD-MoE (ICLR 2026), without its whitening; `activation-expert-tucker` has that.

    Attributes:
        kept: share of the numbers kept, in (0, 1); the ranks of least error at that size are
            chosen.
        ranks: the four ranks themselves, instead; 0 leaves a mode uncompressed. In the first mode,
            that gives every expert its own core, while all share the factors.
        modes: which may be compressed if the ranks follow from `kept`.
        stacked: what the last mode holds: `inputs`: gate and in together, and out alone; `all`: the
            three together; `none`: each alone.
        matrices: which of experts.in, experts.gate and experts.out; by default all.
        sweeps: HOOI sweeps after the HOSVD, at most.
    """

    kept: float | None = None
    ranks: tuple[int, ...] | None = None
    modes: tuple[str, ...] = MODES
    stacked: Literal["inputs", "all", "none"] = "inputs"
    matrices: tuple[str, ...] = ROUTED
    sweeps: int = 1

    source: ClassVar[str] = "https://openreview.net/forum?id=D9cnZNZfxX"
    size_settings: ClassVar[tuple[tuple[str, ...], ...]] = (("kept", "ranks"),)

    def __post_init__(self) -> None:
        if (self.kept is None) == (self.ranks is None):
            raise UserError(f"give one of kept and ranks, got kept={self.kept}, ranks={self.ranks}")
        if self.kept is not None and not 0 < self.kept < 1:
            raise UserError(f"kept must be in (0, 1), got {self.kept}")
        if self.ranks is not None:
            object.__setattr__(self, "ranks", tuple(self.ranks))
            if len(self.ranks) != len(MODES) or any(r < 0 for r in self.ranks):
                raise UserError(
                    f"ranks must be four whole numbers, of {', '.join(MODES)}; 0 leaves a mode "
                    f"alone; got {list(self.ranks)}"
                )
        wrong = [mode for mode in self.modes if mode not in MODES]
        if wrong or not self.modes:
            raise UserError(f"modes must be some of {', '.join(MODES)}, got {list(self.modes)}")
        one_of("stacked", self.stacked, STACKED)
        if self.sweeps < 0:
            raise UserError(f"sweeps must be 0 or more, got {self.sweeps}")
        object.__setattr__(self, "modes", tuple(self.modes))
        object.__setattr__(self, "matrices", check_roles(self.matrices, ROUTED))

    def jobs(self, spec: ModelSpec, layers: Sequence[int]) -> list[Job]:
        """The jobs of each layer; one without experts is skipped, or refused if it was named."""
        if "experts.out" not in spec.roles:
            raise UserError("this mode decomposes the experts of a mixture; this model has none")
        return [
            Job(site, self) for layer in layers for site in self._sites(layer, spec.geometry(layer))
        ]

    def _sites(self, layer: int, geometry: Geometry) -> list[Site]:
        there = [kind for kind in self.matrices if geometry.members(kind) or not geometry.experts]
        apart = {"all": [there], "none": [[kind] for kind in there]}
        out = [kind for kind in there if kind.endswith("out")]
        groups = apart.get(self.stacked, [[kind for kind in there if kind not in out], out])
        return [
            Site((layer,), tuple(r for k in group for r in geometry.members(k) or (k,)), "experts")
            for group in groups
            if group
        ]

    def check(self, shape: tuple[int, ...]) -> None:
        for mode, rank, size in zip(MODES, self.ranks or (), shape, strict=False):
            if rank > size:
                raise UserError(f"the rank of mode {mode} must be in 0..{size}, got {rank}")

    def stored_parameters(self, shape: tuple[int, ...]) -> int | None:
        return None if self.ranks is None else stored_numbers(shape, self._ranks(shape))

    def _ranks(self, shape: Sequence[int]) -> tuple[int, ...]:
        assert self.ranks is not None
        return tuple(r or n for r, n in zip(self.ranks, shape, strict=True))

    def decompose(self, w: Tensor, statistics: Sequence[MatrixStatistics] | None = None) -> Tucker:
        """Factors of (E, F, D, S)."""
        self.check(tuple(w.shape))
        return weighted_tucker(w, self._chosen(w, {}), {}, sweeps=self.sweeps)

    def _roots(self, w: Tensor, statistics: Sequence[MatrixStatistics] | None) -> Roots:
        """Roots of the error weights, by mode."""
        del w, statistics
        return {}

    def _chosen(self, w: Tensor, roots: Roots) -> tuple[int, ...]:
        """The ranks: as given, or the best that store at most the share `kept`."""
        if self.kept is None:
            return self._ranks(w.shape)
        found = size_curve(w, roots, [MODES.index(mode) for mode in self.modes])
        ranks = ranks_within(found, self.kept * w.numel())
        if ranks is None:
            least = int(found.curve.cost_S[0]) / w.numel()
            raise UserError(f"kept must be {least:.3g} or more for these experts, got {self.kept}")
        return ranks

    def curve(
        self, site: Site, w: Tensor, statistics: Sequence[MatrixStatistics] | None = None
    ) -> ErrorCurve:
        modes = [MODES.index(mode) for mode in self.modes]
        curve, sizes_NC = size_curve(w, self._roots(w, statistics), modes)
        return ErrorCurve(*curve, sizes_NC)

    def outline(self, shape: tuple[int, ...], size: Size) -> Factors:
        cut = {mode: rank for mode, rank in enumerate(size) if 0 < rank < shape[mode]}
        return tucker_outline(shape, cut)

    def at_size(self, site: Site, size: Size) -> Self:
        kinds = tuple(kind for kind in self.matrices if kind in site.families)
        return replace(self, kept=None, ranks=size, matrices=kinds)

    @classmethod
    def budget_settings(cls, spec: ModelSpec, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"ranks": (1,) * len(MODES)} | dict(settings)

    @classmethod
    def search_space(cls, spec: ModelSpec, settings: Mapping[str, Any]) -> dict[str, Dimension]:
        if {"kept", "ranks"} & settings.keys():
            return {}
        return {"kept": Dimension(KEPT, (0.0, 1.0), log=False)}

    @classmethod
    def settings_at(cls, spec: ModelSpec, point: Mapping[str, Value]) -> dict[str, Any]:
        return {name: float(f"{value:.6g}") for name, value in point.items()}


@COMPRESSORS.register("activation-expert-tucker")
@dataclass(frozen=True, kw_only=True)
class ActivationExpertTucker(ExpertTucker):
    """`expert-tucker` where errors count by what they do to the outputs on a text.

    Each expert's statistics come from the tokens routed to it. The width of gate and in is whitened
    by the covariance of all experts' inputs; if every expert keeps its own core, cores are refitted
    to each expert's own tokens, and the factor of the width of out is chosen by the covariance of
    the outputs. An expert that gets no tokens is treated as the layer's average one.

    Source: TD-MoE (ICLR 2026), its whitening of inputs; refit and output weighting are ours.
    """

    needs: ClassVar[Needs] = "activations"

    def decompose(self, w: Tensor, statistics: Sequence[MatrixStatistics] | None = None) -> Tucker:
        assert statistics is not None, "measured, as `needs` says"
        self.check(tuple(w.shape))
        roots = self._roots(w, statistics)
        ranks = self._chosen(w, roots)
        cut = {mode for mode, rank in enumerate(ranks) if rank < w.shape[mode]}
        if cut == {WIDTH} and all(one.reads_rows for one in statistics):
            own = {INNER: _own_roots(w, statistics)}
            return weighted_tucker(w, ranks, own, sweeps=self.sweeps)
        found = weighted_tucker(w, ranks, roots, sweeps=self.sweeps)
        if WIDTH in cut <= {WIDTH, INNER} and not any(one.reads_rows for one in statistics):
            return refitted(w, found, _own_weights(w, statistics))
        return found

    def _roots(self, w: Tensor, statistics: Sequence[MatrixStatistics] | None) -> Roots:
        assert statistics is not None
        total_DD = summed_inputs(w, [one for one in statistics if not one.reads_rows])
        return {WIDTH: root_of(total_DD, ridge=RIDGE)} if total_DD.any() else {}


def summed_inputs(w: Tensor, statistics: Sequence[MatrixStatistics]) -> Tensor:
    """(D, D): the sum of x xᵀ over all tokens routed to the experts, float64, on W's device."""
    width = w.shape[WIDTH]
    total_DD = torch.zeros(width, width, dtype=torch.float64, device=w.device)
    for one in statistics:
        total_DD += one.tokens * one.input_covariance_XX.to(w.device)
    return total_DD


def _own_roots(w: Tensor, statistics: Sequence[MatrixStatistics]) -> Tensor:
    """(E, F, F): roots of each expert's input covariance of its output matrix, times its tokens."""
    means_E = torch.stack([o.tokens * o.input_covariance_XX.diagonal().mean() for o in statistics])
    mean = float(means_E.mean()) or 1.0
    nothing = UNREACHED**0.5 * torch.eye(w.shape[INNER], dtype=torch.float64, device=w.device)
    roots = [
        root_of(one.tokens * one.input_covariance_XX.to(w.device), mean) if own else nothing
        for one, own in zip(statistics, means_E.tolist(), strict=True)
    ]
    return torch.stack(roots)


def _own_weights(w: Tensor, statistics: Sequence[MatrixStatistics]) -> Callable[[int], Tensor]:
    """Each expert's input covariance: its own tokens' plus, as a prior, the layer's mean."""
    first = statistics[: len(w)]
    mean_DD = summed_inputs(w, first) / max(1, sum(one.tokens for one in first))
    mean_DD.diagonal().add_(FLOOR * float(mean_DD.diagonal().mean()) or 1.0)
    prior_DD = PRIOR * len(mean_DD) * mean_DD

    def of(expert: int) -> Tensor:
        one = first[expert]
        return one.tokens * one.input_covariance_XX.to(w.device, torch.float64) + prior_DD

    return of
