"""What every rank of a site costs and what error it leaves, from its weights alone.

A tensor turned onto its principal axes (its full higher-order SVD) tells the error of truncating
it to any ranks: the energy of the core outside the leading block (De Lathauwer et al. 2000,
property 9). A matrix is the case of one rank, and its core the singular values.

Shapes: N combinations of ranks, C ranks of one combination.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tensorllm.compressors import Compressor, Job, LaserSVD
from tensorllm.compressors.settings import settings_of
from tensorllm.compressors.tucker import TuckerSettings
from tensorllm.errors import UserError
from tensorllm.tensors.allocation import Curve
from tensorllm.tensors.eigen import all_singular_values
from tensorllm.tensors.frontier import front_of
from tensorllm.tensors.tucker import tucker

DENSE = 32  # of several modes, ranks that are all tried; above, each is 5 % more than the last
STEP = 1.05

Ranks = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class SiteEnergy:
    """The energy of one site's tensor on its principal axes.

    Attributes:
        job: the site, and its strategy at whatever ranks.
        shape: of the stacked tensor.
        energy: squares, float64, an axis per rank; summed over the modes that are left alone.
    """

    job: Job
    shape: tuple[int, ...]
    energy: Tensor

    @property
    def numbers(self) -> int:
        """In the tensor itself."""
        return math.prod(self.shape)

    @cached_property
    def total(self) -> float:
        return float(self.energy.sum())

    @cached_property
    def spectra(self) -> dict[int, Tensor]:
        """Axis -> singular values of the unfolding, largest first."""
        axes = range(self.energy.ndim)
        others = {axis: tuple(a for a in axes if a != axis) for axis in axes}
        sums = {a: self.energy.sum(o) if o else self.energy for a, o in others.items()}
        return {axis: squares.sqrt() for axis, squares in sums.items()}

    def error(self, ranks: Ranks) -> float:
        """Squared error of truncating to these ranks."""
        kept = self.energy[tuple(slice(rank) for rank in ranks)].sum()
        return max(0.0, self.total - float(kept))

    def _errors(self, ranks_NC: Tensor) -> Tensor:
        """The same for many combinations."""
        kept = self.energy
        for axis in range(kept.ndim):
            kept = kept.cumsum(axis)
        return (self.total - kept[tuple((ranks_NC - 1).T)]).clamp(min=0.0)

    def stored(self, ranks_NC: Tensor) -> Tensor:
        """Numbers stored at each combination of ranks."""
        if isinstance(self.job.compressor, LaserSVD):
            return ranks_NC[:, 0] * sum(self.shape)
        sizes_C = torch.tensor(self.shape[: ranks_NC.shape[1]])
        alone = math.prod(self.shape[ranks_NC.shape[1] :])
        return ranks_NC.prod(1) * alone + (ranks_NC * sizes_C).sum(1)

    @cached_property
    def curve(self) -> tuple[Curve, list[Ranks | None]]:
        """The useful combinations by ascending cost; the last one, None, leaves the site alone.

        Errors are those of the matrices brought to a mean square of one: norms after and before
        them undo their size; on tinystories-656K absolute errors served worse in nine of twelve
        cases (four modes, three ratios).
        """
        sizes = self.energy.shape
        axes = [_candidates(n) for n in sizes] if len(sizes) > 1 else [_all(sizes[0])]
        grid = torch.meshgrid(*axes, indexing="ij")
        ranks_NC = torch.stack([axis.flatten() for axis in grid], 1)
        scale = self.numbers / self.total if self.total else 0.0
        cost_N, error_N = self.stored(ranks_NC), self._errors(ranks_NC) * scale
        front = front_of(cost_N, error_N, self.numbers - 1)
        chosen = ranks_NC[front.picks_NC[:, 0] - 1].tolist()
        cost = torch.cat((front.cost_N, torch.tensor([self.numbers])))
        error = torch.cat((front.error_N, torch.zeros(1, dtype=torch.float64)))
        return Curve(cost, error), [*map(tuple, chosen), None]

    def edit(self, ranks: Ranks) -> dict[str, Any]:
        """As one of the edits of `PerLayer`."""
        compressor = _at(self.job, ranks)
        mode, settings = settings_of(compressor)
        if hasattr(compressor, "matrices"):  # told even where they are the default
            settings["matrices"] = list(compressor.matrices)
        return {"layers": list(self.job.site.layers), "mode": mode, **settings}


def site_energy(job: Job, w: Tensor) -> SiteEnergy:
    """The energies of a stacked tensor under the job's strategy.

    Raises:
        UserError: the strategy is none whose ranks can be told from the weights.
    """
    kind = job.compressor
    if isinstance(kind, LaserSVD):
        return SiteEnergy(job, tuple(w.shape), all_singular_values(w, 0).cpu().square())
    if not isinstance(kind, TuckerSettings):
        raise UserError(
            f"the ranks of a {type(kind).__name__} cannot be told from the weights alone; the "
            "modes are shared-tucker, per-matrix-tucker, laser and hybrid"
        )
    core = tucker(w, {mode: w.shape[mode] for mode in kind.modes}).core
    alone = tuple(range(len(kind.modes), core.ndim))
    return SiteEnergy(job, tuple(w.shape), core.square().sum(alone, dtype=torch.float64).cpu())


def _all(size: int) -> Tensor:
    return torch.arange(1, size + 1)


def _candidates(size: int) -> Tensor:
    """Every small rank, then ever larger steps; always the whole size."""
    ranks, rank = list(range(1, min(DENSE, size) + 1)), min(DENSE, size)
    while rank < size:
        rank = min(size, math.ceil(rank * STEP))
        ranks.append(rank)
    return torch.tensor(ranks)


def _at(job: Job, ranks: Sequence[int]) -> Compressor:
    """The job's strategy at these ranks, for the matrices of its site only."""
    kind = job.compressor
    if isinstance(kind, LaserSVD):
        return replace(kind, rho=None, rank=ranks[0], matrices=job.site.roles)
    assert isinstance(kind, TuckerSettings)
    own: dict[str, Any] = {"ranks": tuple(ranks), "energy": None, "error": None}
    if hasattr(kind, "matrices"):
        own["matrices"] = job.site.roles
    return replace(kind, **own)
