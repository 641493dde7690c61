"""What every rank of a tensor stores and what error it leaves, from the tensor alone.

A tensor turned onto its principal axes (its full higher-order SVD) tells the error of truncating
it to any ranks: the energy of the core outside the leading block (De Lathauwer, De Moor and
Vandewalle, "A multilinear singular value decomposition", SIAM J. Matrix Anal. Appl. 2000, property
9). A matrix is the case of one rank, and its core the singular values.

Shapes: N combinations of ranks, C ranks of one combination.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from tensorllm.tensors.allocation import Curve
from tensorllm.tensors.eigen import all_singular_values
from tensorllm.tensors.frontier import front_of
from tensorllm.tensors.tucker import tucker

DENSE = 32  # of several modes, ranks that are all tried; above, each is 5 % more than the last
STEP = 1.05


class SizedCurve(NamedTuple):
    """A curve, and the ranks behind each of its points; all 0: the tensor stays as it is."""

    curve: Curve
    ranks_NC: Tensor


def sized_curve(ranks_NC: Tensor, cost_N: Tensor, error_N: Tensor, numbers: int) -> SizedCurve:
    """The combinations of ranks that none beats in both cost and error, by ascending cost; the last
    point leaves the tensor as it is, without an error.

    Args:
        cost_N: numbers stored at each combination.
        error_N: what is lost there, float64.
        numbers: in the tensor itself; combinations that store as many or more are left out.
    """
    front = front_of(cost_N, error_N, numbers - 1)
    chosen_NC = ranks_NC[front.picks_NC[:, 0] - 1]
    cost = torch.cat((front.cost_N, torch.tensor([numbers])))
    error = torch.cat((front.error_N, torch.zeros(1, dtype=torch.float64)))
    return SizedCurve(Curve(cost, error), torch.cat((chosen_NC, torch.zeros_like(ranks_NC[:1]))))


@dataclass(frozen=True, eq=False)
class Energy:
    """The energy of one tensor on its principal axes.

    Attributes:
        shape: of the tensor.
        energy: squares, float64, an axis per rank; summed over the modes that are not decomposed.
    """

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

    def error(self, ranks: Sequence[int]) -> float:
        """Squared error of truncating to these ranks."""
        kept = self.energy[tuple(slice(rank) for rank in ranks)].sum()
        return max(0.0, self.total - float(kept))

    def errors(self, ranks_NC: Tensor) -> Tensor:
        """The same for many combinations."""
        kept = self.energy
        for axis in range(kept.ndim):
            kept = kept.cumsum(axis)
        return (self.total - kept[tuple((ranks_NC - 1).T)]).clamp(min=0.0)

    def curve(self, stored: Callable[[Tensor], Tensor]) -> SizedCurve:
        """The useful combinations by ascending cost; the last one leaves the tensor as it is.

        Errors are those of the tensor brought to a mean square of one: norms after and before the
        matrices undo their size; on tinystories-656K absolute errors served worse in nine of twelve
        cases (four modes, three ratios).

        Args:
            stored: numbers stored at each combination of ranks (N, C).
        """
        sizes = self.energy.shape
        axes = [candidates(n) for n in sizes] if len(sizes) > 1 else [_all(sizes[0])]
        grid = torch.meshgrid(*axes, indexing="ij")
        ranks_NC = torch.stack([axis.flatten() for axis in grid], 1)
        scale = self.numbers / self.total if self.total else 0.0
        cost_N, error_N = stored(ranks_NC), self.errors(ranks_NC) * scale
        return sized_curve(ranks_NC, cost_N, error_N, self.numbers)


def matrix_energy(w_IO: Tensor) -> Energy:
    """Of a matrix: squares of its singular values."""
    return Energy(tuple(w_IO.shape), all_singular_values(w_IO, 0).cpu().square())


def tucker_energy(w: Tensor, modes: Sequence[int]) -> Energy:
    """Of a tensor that is decomposed over its first modes."""
    core = tucker(w, {mode: w.shape[mode] for mode in modes}).core
    whole = tuple(range(len(modes), core.ndim))
    return Energy(tuple(w.shape), core.square().sum(whole, dtype=torch.float64).cpu())


def tucker_stored(shape: Sequence[int], ranks_NC: Tensor) -> Tensor:
    """Numbers of core and factors at each combination of ranks of the first modes."""
    sizes_C = torch.tensor(shape[: ranks_NC.shape[1]])
    whole = math.prod(shape[ranks_NC.shape[1] :])
    return ranks_NC.prod(1) * whole + (ranks_NC * sizes_C).sum(1)


def _all(size: int) -> Tensor:
    return torch.arange(1, size + 1)


def candidates(size: int) -> Tensor:
    """Every small rank, then ever larger steps; always the whole size."""
    ranks, rank = list(range(1, min(DENSE, size) + 1)), min(DENSE, size)
    while rank < size:
        rank = min(size, math.ceil(rank * STEP))
        ranks.append(rank)
    return torch.tensor(ranks)
