"""Exact rank allocation: Pareto frontiers of cost and error, merged curve by curve.

A frontier holds every (cost, error) that no other point beats in both; the frontiers of two sets of
matrices are merged by adding all pairs. This is exact until there are more than `POINTS` points;
then only the best in each of that many equal ranges of cost is kept (multiple-choice knapsack;
Kellerer, Pferschy and Pisinger, "Knapsack problems", 2004, chapter 11).

Shapes: N points, C picks that led to a point.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

POINTS = 512


class Front(NamedTuple):
    """Points by ascending cost and descending error, and the picks that led to each."""

    cost_N: Tensor
    error_N: Tensor
    picks_NC: Tensor


def front_of(cost_N: Tensor, error_N: Tensor, budget: int) -> Front:
    """The frontier of one curve; the pick is the rank, counted from 1."""
    ranks_N = torch.arange(len(cost_N)) + 1
    return _pareto(Front(cost_N.long(), error_N.double(), ranks_N[:, None]), budget)


def merge(a: Front, b: Front, budget: int) -> Front:
    """The frontier of all affordable pairs of a point of each."""
    cost = (a.cost_N[:, None] + b.cost_N).flatten()
    error = (a.error_N[:, None] + b.error_N).flatten()
    kept = _kept(cost, error, budget)
    left, right = kept // len(b.cost_N), kept % len(b.cost_N)
    picks = torch.cat((a.picks_NC[left], b.picks_NC[right]), dim=1)
    return Front(cost[kept], error[kept], picks)


def union(fronts: Sequence[Front], budget: int) -> Front:
    """The frontier of several alternatives.

    The first pick is the number of the alternative; shorter picks are padded with 0 at the end.
    """
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
    """Indices of the thinned frontier, found before the picks (C columns) are gathered."""
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
    """A mask of the points of a frontier to keep, about `POINTS` of them."""
    kept = torch.ones(len(cost), dtype=torch.bool)
    if len(cost) > POINTS:
        bucket = cost * POINTS // budget  # the budget is 1 or more: with 0 there is one point
        kept[:-1] = bucket[1:] != bucket[:-1]  # the last of a range of costs has its smallest error
        kept[0] = True  # without the cheapest, later merges may exceed the budget
    return kept
