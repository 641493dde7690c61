"""Storage and error of every choice of ranks of a tensor, from the tensor alone.

In the basis of its full higher-order SVD, the error of truncating a tensor to any ranks is the
energy of the core outside the leading block (De Lathauwer, De Moor and Vandewalle, "A multilinear
singular value decomposition", SIAM J. Matrix Anal. Appl. 2000, property 9). A matrix is the case of
one rank; its core is the singular values.

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

DENSE = 32  # with several modes: every rank up to this is tried, above it steps of 5 %
STEP = 1.05


class SizedCurve(NamedTuple):
    """A curve and the ranks of each of its points; all 0 leaves the tensor as it is."""

    curve: Curve
    ranks_NC: Tensor


def sized_curve(ranks_NC: Tensor, cost_N: Tensor, error_N: Tensor, numbers: int) -> SizedCurve:
    """The Pareto frontier of combinations of ranks in cost and error, by ascending cost.

    The last point leaves the tensor as it is, without an error.

    Args:
        ranks_NC: the combinations.
        cost_N: numbers stored by each combination.
        error_N: its error, float64.
        numbers: of the tensor itself; combinations that store as many or more are left out.
    """
    front = front_of(cost_N, error_N, numbers - 1)
    chosen_NC = ranks_NC[front.picks_NC[:, 0] - 1]
    cost = torch.cat((front.cost_N, torch.tensor([numbers])))
    error = torch.cat((front.error_N, torch.zeros(1, dtype=torch.float64)))
    return SizedCurve(Curve(cost, error), torch.cat((chosen_NC, torch.zeros_like(ranks_NC[:1]))))


@dataclass(frozen=True, eq=False)
class Energy:
    """The energy of a tensor's core, in the basis of its full higher-order SVD.

    Attributes:
        shape: of the tensor.
        energy: squared entries of the core, float64, an axis per rank; summed over the modes that
            are not decomposed.
    """

    shape: tuple[int, ...]
    energy: Tensor

    @property
    def numbers(self) -> int:
        """How many numbers the tensor itself has."""
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
        """Squared errors (N,) of many combinations of ranks."""
        kept = self.energy
        for axis in range(kept.ndim):
            kept = kept.cumsum(axis)
        return (self.total - kept[tuple((ranks_NC - 1).T)]).clamp(min=0.0)

    def curve(self, stored: Callable[[Tensor], Tensor]) -> SizedCurve:
        """The Pareto-optimal combinations by ascending cost; the last leaves the tensor as it is.

        Errors are relative: those of the tensor scaled to a mean square of one, as the norms around
        a matrix make up for its scale. On tinystories-656K absolute errors did worse in nine of
        twelve cases (four modes, three ratios).

        Args:
            stored: gives the numbers stored by each combination of ranks (N, C).
        """
        sizes = self.energy.shape
        axes = [candidates(n) for n in sizes] if len(sizes) > 1 else [_all(sizes[0])]
        grid = torch.meshgrid(*axes, indexing="ij")
        ranks_NC = torch.stack([axis.flatten() for axis in grid], 1)
        scale = self.numbers / self.total if self.total else 0.0
        cost_N, error_N = stored(ranks_NC), self.errors(ranks_NC) * scale
        return sized_curve(ranks_NC, cost_N, error_N, self.numbers)


def matrix_energy(w_IO: Tensor) -> Energy:
    """The energy of a matrix: its squared singular values."""
    return Energy(tuple(w_IO.shape), all_singular_values(w_IO, 0).cpu().square())


def tucker_energy(w: Tensor, modes: Sequence[int]) -> Energy:
    """The energy of a tensor that is decomposed over its first modes, `modes`."""
    core = tucker(w, {mode: w.shape[mode] for mode in modes}).core
    whole = tuple(range(len(modes), core.ndim))
    return Energy(tuple(w.shape), core.square().sum(whole, dtype=torch.float64).cpu())


def tucker_stored(shape: Sequence[int], ranks_NC: Tensor) -> Tensor:
    """Numbers in core and factors for each combination of ranks of the first modes."""
    sizes_C = torch.tensor(shape[: ranks_NC.shape[1]])
    whole = math.prod(shape[ranks_NC.shape[1] :])
    return ranks_NC.prod(1) * whole + (ranks_NC * sizes_C).sum(1)


def _all(size: int) -> Tensor:
    return torch.arange(1, size + 1)


def candidates(size: int) -> Tensor:
    """Ranks to try: every small one, then in growing steps up to the full size."""
    ranks, rank = list(range(1, min(DENSE, size) + 1)), min(DENSE, size)
    while rank < size:
        rank = min(size, math.ceil(rank * STEP))
        ranks.append(rank)
    return torch.tensor(ranks)
