"""The exact side of rank allocation: frontiers of cost and error, merged curve by curve.

A frontier has every (cost, error) that no other point beats at both; frontiers of two sets of
matrices merge by adding all pairs. It is exact until it has more than `POINTS` points, of which the
best in each of as many equal ranges of cost are kept (multiple-choice knapsack; Kellerer, Pferschy
and Pisinger, "Knapsack problems", 2004, chapter 11).
Shapes: N points, C picks that led to a point.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

POINTS = 512


class Front(NamedTuple):
    """Points by ascending cost and descending error, and the picks behind each."""

    cost_N: Tensor
    error_N: Tensor
    picks_NC: Tensor


def front_of(cost_N: Tensor, error_N: Tensor, budget: int) -> Front:
    """The frontier of one curve; the pick is the rank, counted from 1."""
    ranks_N = torch.arange(len(cost_N)) + 1
    return _pareto(Front(cost_N.long(), error_N.double(), ranks_N[:, None]), budget)


def merge(a: Front, b: Front, budget: int) -> Front:
    """All affordable pairs of a point of each, and of these the frontier."""
    cost = (a.cost_N[:, None] + b.cost_N).flatten()
    error = (a.error_N[:, None] + b.error_N).flatten()
    kept = _kept(cost, error, budget)
    left, right = kept // len(b.cost_N), kept % len(b.cost_N)
    picks = torch.cat((a.picks_NC[left], b.picks_NC[right]), dim=1)
    return Front(cost[kept], error[kept], picks)


def union(fronts: Sequence[Front], budget: int) -> Front:
    """The frontier of alternatives; the first pick tells which one, shorter ones end in 0."""
    width = max(f.picks_NC.shape[1] for f in fronts)
    picks = []
    for number, front in enumerate(fronts):
        padded = torch.nn.functional.pad(front.picks_NC, (1, width - front.picks_NC.shape[1]))
        padded[:, 0] = number
        picks.append(padded)
    cost_N, error_N = torch.cat([f.cost_N for f in fronts]), torch.cat([f.error_N for f in fronts])
    return _pareto(Front(cost_N, error_N, torch.cat(picks)), budget)


def _pareto(front: Front, budget: int) -> Front:
    kept = _kept(front.cost_N, front.error_N, budget)
    return Front(*(part[kept] for part in front))


def _kept(cost: Tensor, error: Tensor, budget: int) -> Tensor:
    """Indices of the frontier, thinned before any picks are gathered: these have C columns."""
    index = _undominated(cost, error, budget)
    return index[_thinned(cost[index], budget)]


def _undominated(cost: Tensor, error: Tensor, budget: int) -> Tensor:
    """Indices of the affordable points that no cheaper one beats, by ascending cost."""
    index = torch.nonzero(cost <= budget).flatten()
    index = index[error[index].argsort(stable=True)]
    index = index[cost[index].argsort(stable=True)]
    least = error[index].cummin(0).values
    better = torch.ones(len(index), dtype=torch.bool)
    better[1:] = least[1:] < least[:-1]
    return index[better]


def _thinned(cost: Tensor, budget: int) -> Tensor:
    """Which points of a frontier are kept, so that about `POINTS` are left."""
    kept = torch.ones(len(cost), dtype=torch.bool)
    if len(cost) > POINTS:
        bucket = cost * POINTS // budget  # which is 1 or more, else there is one point
        kept[:-1] = bucket[1:] != bucket[:-1]  # the best of a range of costs is its dearest
        kept[0] = True  # the cheapest, without which nothing may fit
    return kept
