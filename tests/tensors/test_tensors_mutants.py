"""What mutation testing found unguarded in tensors/ and metrics.py, against plain references."""

import itertools
import math
from typing import Any

import pytest
import torch

from tensorllm.metrics import METRICS, Percentage, add_answers, answer_metrics
from tensorllm.tensors import allocation, frontier
from tensorllm.tensors.allocation import ClusterChoice, Curve, allocate, error_of
from tensorllm.tensors.frontier import Front, front_of, merge, union

Point = tuple[int, float, tuple[int, ...]]


def curve(seed: int, ranks: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole errors, so that sums are exact and ties happen."""
    noise = torch.Generator().manual_seed(seed)
    cost = torch.randint(1, 5, (ranks,), generator=noise).cumsum(0)
    error = torch.randint(0, 6, (ranks,), generator=noise).flip(0).cumsum(0).flip(0).double()
    return cost, error


def points(front: Front) -> list[Point]:
    columns = (front.cost_N.tolist(), front.error_N.tolist(), front.picks_NC.tolist())
    return [(cost, error, tuple(picks)) for cost, error, picks in zip(*columns, strict=True)]


def undominated(some: list[Point], budget: int) -> list[tuple[int, float]]:
    """The definition, point by point."""
    fit = {(cost, error) for cost, error, _ in some if cost <= budget}
    beaten = {
        (c, e)
        for c, e in fit
        for cost, error in fit
        if (cost <= c and error < e) or (cost < c and error <= e)
    }
    return sorted(fit - beaten)


@pytest.mark.parametrize("budget", [1, 7, 12, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_the_frontier_of_a_curve(seed: int, budget: int):
    cost, error = curve(seed)
    got = points(front_of(cost, error, budget))
    pairs = list(zip(cost.tolist(), error.tolist(), strict=True))
    every = [(c, e, (n + 1,)) for n, (c, e) in enumerate(pairs)]
    assert [point[:2] for point in got] == undominated(every, budget)
    assert all(pairs[pick - 1] == (c, e) for c, e, (pick,) in got)  # ranks count from 1


def test_a_cost_at_the_budget_is_affordable():
    cost, error = torch.tensor([2, 5]), torch.tensor([3.0, 1.0])
    assert [c for c, *_ in points(front_of(cost, error, 5))] == [2, 5]
    assert [c for c, *_ in points(front_of(cost, error, 4))] == [2]
    assert points(front_of(cost, error, 1)) == []


def test_of_equal_costs_the_least_error_stays():
    front = front_of(torch.tensor([3, 3, 3]), torch.tensor([2.0, 1.0, 1.0]), 9)
    assert points(front) == [(3, 1.0, (2,))]


@pytest.mark.parametrize("budget", [4, 11, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_merging_is_all_pairs(seed: int, budget: int):
    curves = [curve(seed), curve(seed + 10, ranks=4), curve(seed + 20, ranks=3)]
    fronts = [front_of(*one, budget) for one in curves]
    got = points(merge(merge(fronts[0], fronts[1], budget), fronts[2], budget))
    every = [
        (
            sum(int(cost[r - 1]) for (cost, _), r in zip(curves, ranks, strict=True)),
            sum(float(error[r - 1]) for (_, error), r in zip(curves, ranks, strict=True)),
            ranks,
        )
        for ranks in itertools.product(*(range(1, len(cost) + 1) for cost, _ in curves))
    ]
    assert [point[:2] for point in got] == undominated(every, budget)
    known = {ranks: (c, e) for c, e, ranks in every}
    assert all(known[ranks] == (c, e) for c, e, ranks in got)


def test_a_union_tells_the_way_and_fills_up_with_zeros():
    short = Front(torch.tensor([1, 6]), torch.tensor([9.0, 2.0]).double(), torch.tensor([[1], [4]]))
    long = Front(torch.tensor([3]), torch.tensor([4.0]).double(), torch.tensor([[2, 5]]))
    got = points(union([short, long], 100))
    assert got == [(1, 9.0, (0, 1, 0)), (3, 4.0, (1, 2, 5)), (6, 2.0, (0, 4, 0))]
    assert points(union([short, long], 5)) == got[:2]
    beaten = Front(torch.tensor([4]), torch.tensor([5.0]).double(), torch.tensor([[7]]))
    assert points(union([short, long, beaten], 100)) == got


def test_thinning_keeps_the_cheapest_and_the_best_of_every_range(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(frontier, "POINTS", 4)
    cost = torch.tensor([0, 1, 9, 10, 19, 20, 29, 30, 39])
    front = front_of(cost, torch.arange(9, 0, -1), 40)  # ranges of ten
    assert [c for c, *_ in points(front)] == [0, 9, 19, 29, 39]
    assert [ranks for *_, ranks in points(front)] == [(1,), (3,), (5,), (7,), (9,)]
    few = front_of(cost[:4], torch.arange(4, 0, -1), 40)
    assert len(few.cost_N) == 4  # as many as are allowed: none is left out


def test_thinning_with_no_budget_at_all(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(frontier, "POINTS", 1)
    free = Front(torch.zeros(1).long(), torch.ones(1).double(), torch.ones(1, 1).long())
    assert points(union([free, free], 0)) == [(0, 1.0, (0, 1))]


def problem(seed: int) -> list[list[list[Curve]]]:
    """Two clusters of two groupings: two curves, or one that stands for both."""
    made = iter(range(100 * seed, 100 * seed + 100))
    return [[[Curve(*curve(next(made))) for _ in range(n)] for n in (2, 1)] for _ in range(2)]


@pytest.mark.parametrize("seed", range(8))
def test_small_budgets_are_spent_as_well_as_brute_force_does(seed: int):
    clusters = problem(seed)
    options = [
        [
            ClusterChoice(grouping, ranks)
            for grouping, curves in enumerate(cluster)
            for ranks in itertools.product(*(range(1, len(c.cost_S) + 1) for c in curves))
        ]
        for cluster in clusters
    ]

    def cost(choices: tuple[ClusterChoice, ...]) -> int:
        return sum(
            int(c.cost_S[rank - 1])
            for cluster, choice in zip(clusters, choices, strict=True)
            for c, rank in zip(cluster[choice.grouping], choice.ranks, strict=True)
        )

    every = [(cost(c), error_of(clusters, c), c) for c in itertools.product(*options)]
    least = min(c for c, *_ in every)
    for budget in (least, least + 1, least + 3, least + 8, 10_000):
        found = allocate(clusters, budget)
        assert cost(tuple(found)) <= budget
        assert error_of(clusters, found) == min(e for c, e, _ in every if c <= budget)
    with pytest.raises(Exception, match=f"store {least} numbers"):
        allocate(clusters, least - 1)


def test_what_is_not_known_does_not_count():
    nan = math.nan
    columns = {
        "correct": [1.0, nan, 0.0, 0.0, nan, nan],
        "token_f1": [0.5, nan, nan, nan, nan, nan],
        "rank": [5.0, nan, 6.0, nan, 1.0, 2.0],
        "log_probability": [-2.0, nan, -9.0, nan, nan, nan],
        "answer_tokens": [1.0, 5.0, 3.0, 1.0, 1.0, 1.0],
    }
    metrics = answer_metrics()
    add_answers(metrics, {name: torch.tensor(values) for name, values in columns.items()})
    found = {name: float(value) for name, value in metrics.compute().items()}
    assert found == pytest.approx(
        {
            "accuracy": 100 / 3,
            "token_f1": 50,
            "top_1": 25,
            "top_5": 75,
            "top_10": 100,
            "loss": (2 + 3) / 2,
            "perplexity": math.exp(11 / 4),
        }
    )
    counts = {name: float(metric.count) for name, metric in metrics.items()}
    assert counts == {
        "accuracy": 3, "token_f1": 1, "top_1": 4, "top_5": 4, "top_10": 4, "loss": 2,
        "perplexity": 4,
    }  # fmt: skip


def test_nothing_counted_is_no_number():
    metrics = answer_metrics()
    nothing = torch.tensor([math.nan])
    add_answers(
        metrics,
        dict.fromkeys(("correct", "token_f1", "rank", "log_probability"), nothing)
        | {"answer_tokens": torch.ones(1)},
    )
    assert all(value.isnan() for value in metrics.compute().values())


def test_devices_add_their_states_and_options_reach_every_metric():
    metrics = answer_metrics(dist_sync_on_step=True)
    names = {"accuracy", "loss", "perplexity", "top_1", "top_5", "top_10", "token_f1"}
    assert set(metrics) == set(METRICS) == names
    for metric in metrics.values():
        assert metric.dist_sync_on_step
        assert metric._reductions.keys() == {"total", "count"}
    one, other = Percentage(), Percentage()
    one.update(torch.tensor([1.0, 1.0, 0.0]))
    other.update(torch.tensor([0.0]))
    one.merge_state(other)  # by the reductions that synchronising uses
    assert float(one.compute()) == pytest.approx(50)
    one.reset()
    assert (float(one.total), float(one.count)) == (0.0, 0.0)


@pytest.fixture
def prices_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the frontiers, which are exact in small problems and so hide the prices."""

    def least(clusters: list[allocation.Cluster], budget: int) -> list[ClusterChoice]:
        return [allocation._cheapest(cluster, math.inf) for cluster in clusters]

    monkeypatch.setattr(allocation, "_by_frontier", least)


@pytest.mark.usefixtures("prices_alone")
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_a_price_finds_the_dearer_way_where_it_pays(scale: float):
    """Steps from the cheapest choice never change the grouping."""
    cheap = Curve(torch.tensor([1, 2, 3]), scale * torch.tensor([9.0, 8.9, 8.8]).double())
    good = Curve(torch.tensor([4, 6, 9]), scale * torch.tensor([3.0, 1.0, 0.9]).double())
    clusters = [[[cheap], [good]] for _ in range(3)]
    assert allocate(clusters, 18) == [ClusterChoice(1, (2,))] * 3  # 18 numbers at the budget of 18
    found = allocate(clusters, 21)
    assert sorted(choice.ranks for choice in found) == [(2,), (2,), (3,)]
    assert allocate(clusters, 27) == [ClusterChoice(1, (3,))] * 3  # all there is
    assert allocate(clusters, 3) == [ClusterChoice(0, (1,))] * 3  # the least there is


@pytest.mark.usefixtures("prices_alone")
def test_a_price_may_spend_the_budget_to_the_last_number():
    only = Curve(torch.tensor([1]), torch.tensor([9.0]).double())
    good = Curve(torch.tensor([4, 100]), torch.tensor([3.0, 2.9]).double())
    assert allocate([[[only], [good]]] * 2, 8) == [ClusterChoice(1, (1,))] * 2


@pytest.mark.usefixtures("prices_alone")
@pytest.mark.parametrize("seed", range(4))
def test_convex_curves_of_unit_costs_are_shared_out_exactly(seed: int):
    noise = torch.Generator().manual_seed(seed)
    curves = []
    for _ in range(3):
        gains = torch.randint(1, 50, (5,), generator=noise).double().sort().values
        curves.append(Curve(torch.arange(1, 6), gains.flip(0).sum() - gains.flip(0).cumsum(0)))
    clusters = [[[one]] for one in curves]
    for budget in range(3, 16):
        errors = [
            sum(float(c.error_S[r - 1]) for c, r in zip(curves, ranks, strict=True))
            for ranks in itertools.product(range(1, 6), repeat=3)
            if sum(ranks) <= budget
        ]
        assert error_of(clusters, allocate(clusters, budget)) == pytest.approx(min(errors))


def test_merged_frontiers_are_thinned_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(frontier, "POINTS", 3)
    one = Front(
        torch.tensor([0, 10, 25]), torch.tensor([9.0, 5.0, 1.0]).double(), torch.eye(3).long()
    )
    two = merge(one, one, 60)
    assert [c for c, *_ in points(two)] == [0, 10, 35, 50]  # the dearest of every third of 60
    assert points(merge(one, one, 5)) == [(0, 18.0, (1, 0, 0, 1, 0, 0))]


def test_what_is_left_buys_the_most_gain_per_number():
    def curve_of(costs: list[int], errors: list[float]) -> Curve:
        return Curve(torch.tensor(costs), torch.tensor(errors).double())

    steps = [[[curve_of([1, 2, 5], [10, 7, 4]), curve_of([1, 4], [10, 5])]]]
    assert allocation._spend_rest(steps, [ClusterChoice(0, (1, 1))], 6) == [
        ClusterChoice(0, (2, 2))
    ]
    near = [[[curve_of([1, 2], [10, 9.9]), curve_of([1, 3], [2, 0])]]]
    assert allocation._spend_rest(near, [ClusterChoice(0, (1, 1))], 4) == [ClusterChoice(0, (1, 2))]
    idle = [[[curve_of([1, 2], [3, 3])]]]
    assert allocation._spend_rest(idle, [ClusterChoice(0, (1,))], 9) == [ClusterChoice(0, (1,))]


def test_choices_that_do_not_fit_the_clusters_are_an_error():
    clusters = [[[Curve(*curve(0))]], [[Curve(*curve(1))]]]
    for choices in ([ClusterChoice(0, (1,))], [ClusterChoice(0, (1,)), ClusterChoice(0, (1, 1))]):
        with pytest.raises(ValueError, match="zip"):
            error_of(clusters, choices)


def test_a_matrix_of_rank_one_is_allocated_too():
    """It has one rank to choose."""
    one = Curve(torch.tensor([2]), torch.tensor([0.0]).double())
    other = Curve(torch.tensor([1, 2, 3]), torch.tensor([5.0, 1.0, 0.0]).double())
    assert allocate([[[one, other]]], 4) == [ClusterChoice(0, (1, 2))]


def test_picks_are_gathered_only_for_points_that_stay(monkeypatch: pytest.MonkeyPatch):
    """All pairs of two frontiers are many; picks of each are gigabytes for a hundred layers."""
    rows = []
    cat = torch.cat

    def counted(parts: Any, dim: int = 0) -> torch.Tensor:
        rows.append(max(len(part) for part in parts))
        return cat(parts, dim)

    monkeypatch.setattr(torch, "cat", counted)
    cost = torch.arange(1, 2001)
    one = Curve(cost * 1009, 1 / cost.double())
    other = Curve(cost * 7, 1 / cost.double() ** 2)
    chosen = allocate([[[one]], [[other]]], budget=1_500_000)
    assert max(rows) <= frontier.POINTS + 1
    assert all(1 <= rank <= 2000 for choice in chosen for rank in choice.ranks)
