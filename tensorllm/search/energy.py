"""Ranks without data: what the spectra of the weights alone say.

Three rules, each a point per layer: keep a share of the energy of every mode; keep what lies above
the Marchenko-Pastur edge of noise; meet a ratio with the least error that greedy steps find.

Shapes: D model width, K head width, M = 2g+2 matrices per group, G groups; R1, R2, R3 ranks of the
first three modes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from tensorllm.errors import UserError
from tensorllm.tensors.ranks import (
    compression_ratio,
    marchenko_pastur_edge,
    ranks_for_energy,
    tucker_parameters,
)

Spectra = Mapping[int, Tensor]  # mode -> singular values of its unfolding, largest first


class Allocation(NamedTuple):
    """Ranks of each layer's tensor, the ratio over all, and a bound of the relative error.

    The squared error of a truncated HOSVD is at most the sum of the energies that its modes
    discard (De Lathauwer et al. 2000, property 10).
    """

    ranks: list[dict[int, int]]
    ratio: float
    error_bound: float


def by_energy(spectra: Sequence[Spectra], shape: Sequence[int], share: float) -> Allocation:
    """The smallest ranks that keep `share` of the energy in every mode of every layer."""
    return _allocation(spectra, shape, [ranks_for_energy(of, share) for of in spectra])


def by_noise_edge(spectra: Sequence[Spectra], shape: Sequence[int]) -> Allocation:
    """The singular values that independent noise would not have.

    The noise's deviation is that for which the median singular value of an unfolding lies at the
    median of the Marchenko-Pastur law, found from the weakest mode; see Gavish and Donoho, "The
    optimal hard threshold for singular values is 4/sqrt(3)", IEEE Trans. Inf. Theory 2014.
    """
    chosen = []
    for of in spectra:
        ranks = {}
        for mode, values in of.items():
            rows, columns = shape[mode], math.prod(shape) // shape[mode]
            sigma = float(values.median()) / math.sqrt(max(rows, columns))
            edge = marchenko_pastur_edge((rows, columns), sigma)
            ranks[mode] = max(1, int((values > edge).sum()))
        chosen.append(ranks)
    return _allocation(spectra, shape, chosen)


def by_ratio(spectra: Sequence[Spectra], shape: Sequence[int], ratio: float) -> Allocation:
    """Ranks of all layers that meet `ratio`, by marginal error per parameter.

    From full ranks, the step (one mode of one layer to its next smaller useful rank) that adds the
    least discarded energy per parameter saved is taken until the ratio is met.

    Raises:
        UserError: even rank one everywhere is larger; says the best reachable ratio.
    """
    best = compression_ratio(shape, dict.fromkeys(spectra[0], 1))
    if not 0 < ratio <= best:
        raise UserError(f"the ratio must be in (0, {best:.4g}], the best reachable, got {ratio:g}")
    tails = [{mode: _tails(values) for mode, values in of.items()} for of in spectra]
    ranks = [{mode: len(values) for mode, values in of.items()} for of in spectra]
    budget = len(spectra) * math.prod(shape) / ratio
    sizes = [tucker_parameters(shape, of) for of in ranks]
    steps = {
        (i, mode): _price(shape, tails[i][mode], ranks[i], mode)
        for i, of in enumerate(ranks)
        for mode in of
    }
    while sum(sizes) > budget:
        i, mode = min(steps, key=lambda place: steps[place])
        ranks[i][mode] = _next(ranks[i][mode])
        sizes[i] = tucker_parameters(shape, ranks[i])
        for other in ranks[i]:
            steps[i, other] = _price(shape, tails[i][other], ranks[i], other)
    return _allocation(spectra, shape, ranks)


def _next(rank: int) -> int:
    """A step of about three per cent, at least one."""
    return max(1, min(rank - 1, round(rank * 0.97)))


def _price(shape: Sequence[int], tail: list[float], ranks: Mapping[int, int], mode: int) -> float:
    """Energy that the next step discards per parameter that it saves."""
    rank = ranks[mode]
    if rank == 1:
        return math.inf
    smaller = {**ranks, mode: _next(rank)}
    saved = tucker_parameters(shape, ranks) - tucker_parameters(shape, smaller)
    return (tail[_next(rank)] - tail[rank]) / saved


def _tails(singular: Tensor) -> list[float]:
    """Relative energy beyond each rank, 0 to all."""
    squares = singular.double().square()
    left = [*squares.flip(0).cumsum(0).flip(0).tolist(), 0.0]
    return [value / left[0] for value in left] if left[0] else left


def _allocation(
    spectra: Sequence[Spectra], shape: Sequence[int], ranks: list[dict[int, int]]
) -> Allocation:
    stored = sum(tucker_parameters(shape, of) for of in ranks)
    energy = [float(next(iter(of.values())).double().square().sum()) for of in spectra]
    lost = sum(
        e * min(1.0, sum(_tails(of[mode])[rank] for mode, rank in chosen.items()))
        for e, of, chosen in zip(energy, spectra, ranks, strict=True)
    )
    total = sum(energy)
    bound = math.sqrt(lost / total) if total else 0.0
    return Allocation(ranks, len(ranks) * math.prod(shape) / stored, bound)
