"""One decomposition per site serves every trial: smaller ranks are slices of the largest ones.

Shapes: I rows and O columns of a matrix, R rank.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tensorllm.compressors import Compressor, Job, LaserSVD, Leaf, Site
from tensorllm.compressors.tucker import TuckerSettings
from tensorllm.models import RoleMatrices
from tensorllm.tensors.factors import Factors, LowRank, Tucker, cast
from tensorllm.tensors.ranks import laser_rank
from tensorllm.tensors.tucker import relative_error, truncate

EXACT_BELOW = 2**24  # 64 MiB in float32
MARGIN = 2


class Edit(NamedTuple):
    """New role matrices of one site, and how far they are from the old ones."""

    site: Site
    matrices: list[Tensor]
    relative_error: float


class Bank:
    """Decompositions of a model's sites, each made once at the largest ranks of the space.

    Args:
        roles: of the model.
        weights: its parameters by name, unedited whenever `edits` is called for a new site.
        largest: strategies at the largest ranks that will be asked for, one per kind.
        exact_below: tensors of at most so many numbers are turned onto their principal axes and
            not truncated; the core that a trial decomposes is then as good as the weights. Of
            larger ones the leading `MARGIN` times the largest ranks are kept.
    """

    def __init__(
        self,
        roles: RoleMatrices,
        weights: Mapping[str, Tensor],
        largest: Iterable[Job],
        *,
        exact_below: int = EXACT_BELOW,
    ) -> None:
        self.roles = roles
        self.weights = weights
        self.exact_below = exact_below
        self.decompositions = 0
        self._largest: dict[Site, Any] = {}
        for job in largest:
            known = self._largest.get(job.site)
            self._largest[job.site] = (
                job.compressor if known is None else larger(known, job.compressor, self._shape(job))
            )
        self._factors: dict[Site, Factors] = {}

    def edits(self, jobs: Sequence[Job]) -> list[Edit]:
        """The matrices that these jobs would write, rounded as stored factors are."""
        return [self._edit(job) for job in jobs]

    def _edit(self, job: Job) -> Edit:
        site, geometry = job.site, self.roles.geometry
        w = site.stack([self.roles.read(self.weights, *m) for m in site.matrices], geometry)
        factors = cast(self._sliced(job, w), w.dtype)
        error = relative_error(w, factors)
        return Edit(site, site.unstack(factors.dense(), geometry), error)

    def _sliced(self, job: Job, w: Tensor) -> Factors:
        kind = self._largest.get(job.site)
        if kind is None:  # a strategy whose decompositions do not nest
            self.decompositions += 1
            assert isinstance(job.compressor, Leaf), "what is fitted to a text was refused"
            return job.compressor.decompose(w)
        if job.site not in self._factors:
            self._factors[job.site] = self._enlarged(kind, tuple(w.shape)).decompose(w)
            self.decompositions += 1
        return sliced(self._factors[job.site], job.compressor, tuple(w.shape))

    def _enlarged(self, kind: Any, shape: tuple[int, ...]) -> Any:
        """Tucker ranks with a margin: the best subspaces of smaller ranks are not quite nested."""
        if not isinstance(kind, TuckerSettings):
            return kind
        scale = float("inf") if math.prod(shape) <= self.exact_below else MARGIN
        sizes = [shape[mode] for mode in kind.modes]
        ranks = tuple(int(min(n, scale * r)) for n, r in zip(sizes, kind.ranks or (), strict=True))
        return replace(kind, ranks=ranks)

    def _shape(self, job: Job) -> tuple[int, ...]:
        return job.site.shape(self.roles.geometry)


def nests(compressor: Compressor) -> bool:
    """Whether slices of the strategy's largest decomposition are its smaller ones."""
    if isinstance(compressor, TuckerSettings):
        return compressor.ranks is not None
    return isinstance(compressor, LaserSVD) and compressor.method == "exact"


def larger(one: Compressor, other: Compressor, shape: tuple[int, ...]) -> Compressor:
    """The strategy at the larger of the ranks of two, mode by mode."""
    if isinstance(one, TuckerSettings) and isinstance(other, TuckerSettings):
        return replace(one, ranks=tuple(map(max, one.ranks or (), other.ranks or ())))
    assert isinstance(one, LaserSVD)
    assert isinstance(other, LaserSVD)
    return replace(one, rho=None, rank=max(_laser_rank(c, shape) for c in (one, other)))


def sliced(largest: Factors, compressor: Compressor, shape: tuple[int, ...]) -> Factors:
    """The factors at the compressor's ranks: a small core decomposed anew, or leading columns."""
    if isinstance(largest, Tucker):
        assert isinstance(compressor, TuckerSettings)
        ranks = dict(zip(compressor.modes, compressor.ranks or (), strict=True))
        same = all(largest.factors[mode].shape[1] == rank for mode, rank in ranks.items())
        return largest if same else truncate(largest, ranks, refine=True)
    assert isinstance(largest, LowRank)
    assert isinstance(compressor, LaserSVD)
    rank = _laser_rank(compressor, shape)
    return LowRank(largest.u_IR[:, :rank], largest.v_RO[:rank])


def _laser_rank(compressor: LaserSVD, shape: tuple[int, ...]) -> int:
    return compressor.rank or laser_rank(compressor.rho or 0.0, shape)


class edited:  # noqa: N801  a context manager reads as a verb
    """The model with other weights, for a while; then bit for bit as before."""

    def __init__(
        self, edits: Sequence[Edit], roles: RoleMatrices, weights: Mapping[str, Tensor]
    ) -> None:
        self.edits = edits
        self.roles = roles
        self.weights = weights
        self._before: dict[str, Tensor] = {}

    def __enter__(self) -> None:
        names = {self.roles.name(*m) for edit in self.edits for m in edit.site.matrices}
        self._before = {name: self.weights[name].clone() for name in names}
        for edit in self.edits:
            for (layer, role), w_ID in zip(edit.site.matrices, edit.matrices, strict=True):
                self.roles.write(self.weights, layer, role, w_ID)

    def __exit__(self, *exception: object) -> None:
        with torch.no_grad():
            for name, before in self._before.items():
                self.weights[name].copy_(before)
