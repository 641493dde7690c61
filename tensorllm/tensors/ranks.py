"""Ranks: checks, choices for a target, and parameter counts.

Source of the counts: Gu et al., "TensorLLM", IJCNN 2025, section III (arXiv 2501.15674).
"""

import math
import operator
from collections.abc import Mapping, Sequence
from typing import SupportsIndex

from torch import Tensor

from tensorllm.errors import UserError


def check_ranks(ranks: Sequence[object], sizes: Sequence[int]) -> tuple[int, ...]:
    """The ranks (R1, R2, ...) as ints, each within 1..size of its mode.

    Raises:
        UserError: wrong count, not integers, or out of range; the message names the rank and its
            range.
    """
    allowed = ", ".join(f"R{i} in 1..{size}" for i, size in enumerate(sizes, 1))
    if isinstance(ranks, str | bytes) or not isinstance(ranks, Sequence):
        raise UserError(f"ranks must be {len(sizes)} integers ({allowed}), got {ranks!r}")
    if len(ranks) != len(sizes):
        raise UserError(f"{len(sizes)} ranks are needed ({allowed}), got {len(ranks)}: {ranks!r}")
    return tuple(check_rank(f"R{i + 1}", ranks[i], size) for i, size in enumerate(sizes))


def check_rank(name: str, rank: object, size: int) -> int:
    """One rank as an int within 1..size.

    Raises:
        UserError: not an integer, or out of range.
    """
    if isinstance(rank, bool) or not isinstance(rank, SupportsIndex):
        raise UserError(f"rank {name} must be an integer in 1..{size}, got {rank!r}")
    if not 1 <= operator.index(rank) <= size:
        raise UserError(f"rank {name} must be in 1..{size}, got {rank}")
    return operator.index(rank)


def laser_rank(rho: float, shape: Sequence[int]) -> int:
    """LASER's r = floor(rho * min(shape)), at least 1; rho is the share of the rank that is kept.

    Tolerates binary rounding: 0.29 of 100 is 29, although 0.29 * 100 is 28.999999999999996.

    Raises:
        UserError: rho is not in (0, 1].
    """
    if isinstance(rho, bool) or not isinstance(rho, int | float) or not 0 < rho <= 1:
        raise UserError(f"rho (share of the rank kept) must be in (0, 1], got {rho!r}")
    return max(1, math.floor(rho * min(shape) * (1 + 1e-9)))


def ranks_for_energy(spectra: Mapping[int, Tensor], share: float) -> dict[int, int]:
    """For each mode the smallest rank that keeps `share` of the energy of its unfolding.

    Args:
        spectra: mode -> singular values of the mode's unfolding, largest first.
        share: of the sum of squares, in (0, 1].
    """
    if not 0 < share <= 1:
        raise UserError(f"the share of energy must be in (0, 1], got {share!r}")
    return {mode: _rank_with_tail(s, 1 - share) for mode, s in spectra.items()}


def ranks_for_error(spectra: Mapping[int, Tensor], error: float) -> dict[int, int]:
    """Ranks at which the decomposition has a relative error of at most `error`.

    The squared error of a sequentially truncated HOSVD is at most the sum of the energies discarded
    in the modes (Vannieuwenhoven et al. 2012, theorem 5.1), so each mode gets an equal part of it.
    """
    if not 0 <= error < 1:
        raise UserError(f"the relative error must be in [0, 1), got {error!r}")
    part = error**2 / max(1, len(spectra))
    return {mode: _rank_with_tail(s, part) for mode, s in spectra.items()}


def _rank_with_tail(singular: Tensor, tail: float) -> int:
    """The smallest rank >= 1 that discards at most `tail` of the energy."""
    squares = singular.double().square()
    left = squares.flip(0).cumsum(0).flip(0)  # energy from component i on, without cancellation
    return max(1, int((left > tail * left[0]).sum()))


def tucker_parameters(sizes: Sequence[int], ranks: Mapping[int, int]) -> int:
    """Numbers in a core and its factors.

    For modes 0, 1, 2 of (D, K, 4, H): R1·R2·R3·H + D·R1 + K·R2 + 4·R3.

    Args:
        sizes: of the decomposed tensor.
        ranks: mode -> rank; absent modes keep their size and have no factor.
    """
    core = math.prod(ranks.get(mode, size) for mode, size in enumerate(sizes))
    return core + sum(sizes[mode] * rank for mode, rank in ranks.items())


def low_rank_parameters(shape: Sequence[int], rank: int) -> int:
    """Numbers in the two factors of a rank-`rank` matrix."""
    return rank * sum(shape)


def marchenko_pastur_edge(shape: Sequence[int], sigma: float) -> float:
    """The largest singular value of a matrix of independent noise with standard deviation `sigma`.

    Source: Marchenko and Pastur 1967; the edge is sigma * (sqrt(rows) + sqrt(columns)).
    """
    return sigma * sum(math.sqrt(size) for size in shape)
