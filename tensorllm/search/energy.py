"""Ranks without data: what the spectra of the weights alone say.

Three rules over the sites of a compression: keep a share of the energy of every mode; keep what
lies above the Marchenko-Pastur edge of noise; meet a size with the least squared error.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from tensorllm.errors import UserError
from tensorllm.search.sites import Ranks, SiteEnergy
from tensorllm.tensors.allocation import allocate
from tensorllm.tensors.ranks import marchenko_pastur_edge, ranks_for_energy

STEPS = 40  # of the bisection


class Allocation(NamedTuple):
    """Ranks of each site (None: left as it is), the ratio over all, and the relative error.

    The error is that of the truncated higher-order SVD, over all sites.
    """

    ranks: list[Ranks | None]
    ratio: float
    error: float


def edits_of(sites: Sequence[SiteEnergy], chosen: Allocation) -> list[dict[str, Any]]:
    """The edits that `PerLayer` takes; sites that are left alone have none."""
    pairs = zip(sites, chosen.ranks, strict=True)
    return [site.edit(ranks) for site, ranks in pairs if ranks is not None]


def by_energy(sites: Sequence[SiteEnergy], share: float) -> Allocation:
    """The smallest ranks that keep `share` of the energy in every mode of every site."""
    return _allocation(
        sites, [tuple(ranks_for_energy(site.spectra, share).values()) for site in sites]
    )


def by_energy_at(sites: Sequence[SiteEnergy], ratio: float) -> tuple[float, Allocation]:
    """The largest share of energy whose ranks meet the ratio, by bisection, and the ranks."""
    low, high = 0.0, 1.0
    best = by_energy(sites, 1e-12)
    if best.ratio < ratio:
        raise UserError(_unreachable(best.ratio, ratio))
    for _ in range(STEPS):
        middle = (low + high) / 2
        found = by_energy(sites, middle)
        if found.ratio >= ratio:
            low, best = middle, found
        else:
            high = middle
    return low, best


def by_noise_edge(sites: Sequence[SiteEnergy]) -> Allocation:
    """The singular values that independent noise would not have.

    The noise's deviation is that for which the median singular value of an unfolding is the median
    of the Marchenko-Pastur law; see Gavish and Donoho, "The optimal hard threshold for singular
    values is 4/sqrt(3)", IEEE Trans. Inf. Theory 2014, section III.E.
    """
    return _allocation(sites, [_above_edge(site) for site in sites])


def by_size(sites: Sequence[SiteEnergy], budget: int) -> Allocation:
    """Ranks that store at most `budget` numbers with about the least squared error.

    Each rank is worth the relative error that it takes away per number that it costs; layers,
    modes and matrices compete for one budget. A site worth its full size stays as it is.

    Raises:
        UserError: even the least ranks everywhere store more; says the best reachable ratio.
    """
    curves = [site.curve for site in sites]
    before = sum(site.numbers for site in sites)
    least = least_size(sites)
    if budget < least:
        raise UserError(_unreachable(before / least, before / max(1, budget)))
    choices = allocate([[[curve]] for curve, _ in curves], budget)
    ranks = [of[c.ranks[0] - 1] for (_, of), c in zip(curves, choices, strict=True)]
    return _allocation(sites, ranks)


def least_size(sites: Sequence[SiteEnergy]) -> int:
    """Numbers stored at rank 1 everywhere."""
    return sum(int(site.curve[0].cost_S[0]) for site in sites)


def by_ratio(sites: Sequence[SiteEnergy], ratio: float) -> Allocation:
    """`by_size` for a ratio of the numbers in all sites to those stored."""
    return by_size(sites, math.floor(sum(site.numbers for site in sites) / ratio))


def _unreachable(best: float, ratio: float) -> str:
    return f"a ratio of {ratio:.4g} cannot be met; the best reachable is {best:.4g} (rank 1)"


def _above_edge(site: SiteEnergy) -> Ranks:
    ranks = []
    for axis, values in site.spectra.items():
        rows, columns = site.shape[axis], site.numbers // site.shape[axis]
        small, large = sorted((rows, columns))
        sigma = float(values.median()) / math.sqrt(large * _median(small / large))
        edge = marchenko_pastur_edge((rows, columns), sigma)
        ranks.append(max(1, int((values > edge).sum())))
    return tuple(ranks)


@cache
def _median(aspect: float, points: int = 20_001) -> float:
    """The median of the Marchenko-Pastur law of squared singular values, by the trapezoid rule."""
    low, high = (1 - math.sqrt(aspect)) ** 2, (1 + math.sqrt(aspect)) ** 2
    x = np.linspace(low, high, points)[1:-1]
    density = np.sqrt((high - x) * (x - low)) / x
    below = np.cumsum(density)
    return float(x[int(np.searchsorted(below, below[-1] / 2))])


def _allocation(sites: Sequence[SiteEnergy], ranks: Sequence[Ranks | None]) -> Allocation:
    stored = lost = 0.0
    for site, chosen in zip(sites, ranks, strict=True):
        if chosen is None:
            stored += site.numbers
        else:
            stored += int(site.stored(torch.tensor([chosen])))
            lost += site.error(chosen)
    before, total = sum(site.numbers for site in sites), sum(site.total for site in sites)
    return Allocation(list(ranks), before / stored, math.sqrt(lost / total) if total else 0.0)
