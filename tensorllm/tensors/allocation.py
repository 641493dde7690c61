"""Ranks for many matrices from one budget, chosen by the error that each stored number saves.

A curve gives the cost of each rank (numbers stored) and the error it leaves. A cluster is a set of
matrices with alternative groupings, each a list of curves. For a given Lagrange multiplier λ on the
numbers stored, the optimum is found curve by curve; λ is bisected until the budget is met, and what
is left over buys the best steps that still fit. Merging frontiers (exact for small problems) gives
a second choice; the better of the two is taken.

Shapes: S ranks of a curve, 1 to S.
"""

import math
from collections.abc import Sequence
from functools import partial, reduce
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import NamedTuple

from torch import Tensor

from tensorllm.errors import UserError
from tensorllm.tensors.frontier import front_of, merge, union


class Curve(NamedTuple):
    """Cost and error of the ranks 1 to S; costs ascend, errors descend."""

    cost_S: Tensor
    error_S: Tensor


Cluster = Sequence[Sequence[Curve]]  # alternative groupings of its matrices, a list of curves each


class ClusterChoice(NamedTuple):
    """The chosen grouping of a cluster, and the rank of each of its curves."""

    grouping: int
    ranks: tuple[int, ...]


def allocate(clusters: Sequence[Cluster], budget: int) -> list[ClusterChoice]:
    """The choice for each cluster that about minimises the summed error within the budget.

    Args:
        clusters: the matrices, in clusters.
        budget: numbers that may be stored.

    Raises:
        UserError: even rank 1 everywhere costs more; the message says how much.
    """
    least = [_cheapest(cluster, math.inf) for cluster in clusters]
    if _cost(clusters, least) > budget:
        raise UserError(
            f"the smallest factors that there are (rank 1) store {_cost(clusters, least)} numbers, "
            f"more than the {budget} asked for"
        )
    free = [_cheapest(cluster, 0.0) for cluster in clusters]
    if _cost(clusters, free) <= budget:
        return free
    low, high = _prices(clusters)
    affordable = [least]
    for _ in range(80):
        middle = (low * high) ** 0.5
        chosen = [_cheapest(cluster, middle) for cluster in clusters]
        if _cost(clusters, chosen) <= budget:
            high = middle
            if chosen != affordable[-1]:
                affordable.append(chosen)
        else:
            low = middle
    # What the lowest affordable multiplier leaves over may buy nothing, so others are tried too.
    affordable.append(_by_frontier(clusters, budget))
    spent = [_spend_rest(clusters, choices, budget) for choices in affordable]
    return min(spent, key=lambda choices: error_of(clusters, choices))


def error_of(clusters: Sequence[Cluster], choices: Sequence[ClusterChoice]) -> float:
    """The summed error of a choice."""
    return sum(float(curve.error_S[rank - 1]) for curve, rank in _chosen_curves(clusters, choices))


def _cheapest(cluster: Cluster, multiplier: float) -> ClusterChoice:
    """The grouping and ranks with the least error + multiplier · cost (at infinity: least cost)."""
    options = []
    for grouping, curves in enumerate(cluster):
        totals = [
            c.error_S + multiplier * c.cost_S if multiplier < math.inf else c.cost_S for c in curves
        ]
        ranks = tuple(int(total_S.argmin()) + 1 for total_S in totals)
        options.append(
            (sum(float(total_S.min()) for total_S in totals), ClusterChoice(grouping, ranks))
        )
    return min(options)[1]  # ties: the first grouping


def _by_frontier(clusters: Sequence[Cluster], budget: int) -> list[ClusterChoice]:
    """The best choice from merged frontiers, exact while they are small."""
    merged = partial(merge, budget=budget)
    fronts = [
        union(
            [reduce(merged, [front_of(*curve, budget) for curve in curves]) for curves in cluster],
            budget,
        )
        for cluster in clusters
    ]
    widths = [front.picks_NC.shape[1] for front in fronts]
    picks = reduce(merged, fronts).picks_NC[-1].split(widths)
    return [
        ClusterChoice(grouping, tuple(r for r in ranks if r))
        for grouping, *ranks in map(Tensor.tolist, picks)
    ]


def _prices(clusters: Sequence[Cluster]) -> tuple[float, float]:
    """Lower and upper bounds of the multiplier for the bisection."""
    curves = [curve for cluster in clusters for grouping in cluster for curve in grouping]
    top = max(float(curve.error_S[0]) for curve in curves)
    return top * 1e-18, top * 1e3


def _spend_rest(
    clusters: Sequence[Cluster], choices: Sequence[ClusterChoice], budget: int
) -> list[ClusterChoice]:
    """Repeatedly buy the affordable higher rank with the largest error reduction per number."""
    chosen = _chosen_curves(clusters, choices)
    curves, ranks = [curve for curve, _ in chosen], [rank for _, rank in chosen]
    left = budget - _cost(clusters, choices)
    steps = [_best_step(curve, i, rank, left) for i, (curve, rank) in enumerate(chosen)]
    heap = [step for step in steps if step]
    heapify(heap)
    while heap:
        _, i, rank, cost = heappop(heap)
        if cost <= left:
            left, ranks[i] = left - cost, rank
        # If it no longer fits, a smaller step may.
        if step := _best_step(curves[i], i, ranks[i], left):
            heappush(heap, step)
    each = iter(ranks)
    return [ClusterChoice(one.grouping, tuple(islice(each, len(one.ranks)))) for one in choices]


def _best_step(curve: Curve, i: int, rank: int, left: int) -> tuple[float, int, int, int] | None:
    """(-gain per number, curve's index, the higher rank, its extra cost); None if no step helps."""
    cost_S, error_S = curve
    price_S = cost_S[rank:] - cost_S[rank - 1]
    price_S = price_S[price_S <= left]
    if not price_S.numel():
        return None
    gain_S = (error_S[rank - 1] - error_S[rank : rank + len(price_S)]) / price_S
    best = int(gain_S.argmax())
    gain = float(gain_S[best])
    return (-gain, i, rank + 1 + best, int(price_S[best])) if gain > 0 else None


def _cost(clusters: Sequence[Cluster], choices: Sequence[ClusterChoice]) -> int:
    return sum(int(curve.cost_S[rank - 1]) for curve, rank in _chosen_curves(clusters, choices))


def _chosen_curves(
    clusters: Sequence[Cluster], choices: Sequence[ClusterChoice]
) -> list[tuple[Curve, int]]:
    return [
        (curve, rank)
        for cluster, choice in zip(clusters, choices, strict=True)
        for curve, rank in zip(cluster[choice.grouping], choice.ranks, strict=True)
    ]
