"""The maths under data-aware compression against brute force and plain formulas.

Shapes: I rows, O columns, R rank, S ranks of a curve.
"""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tensorllm.errors import UserError
from tensorllm.tensors import pivoted
from tensorllm.tensors.allocation import Curve, allocate, error_of
from tensorllm.tensors.factors import FACTORS, cast, parameters
from tensorllm.tensors.pivoted import PivotedLowRank, pivot, pivoted_parameters
from tensorllm.tensors.weighted import Metric, left_out, regression, weighted_svd

SHAPES = [(12, 7), (7, 12), (9, 9), (40, 3)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size: int, samples: int, seed: int) -> Tensor:
    x = randn(samples, size, seed=seed)
    return x.mT @ x / samples


@pytest.mark.parametrize("shape", SHAPES)
def test_pivoting_changes_nothing_but_the_count(shape):
    for rank in range(1, min(shape) + 1):
        u, v = randn(shape[0], rank, seed=rank), randn(rank, shape[1], seed=50 + rank)
        factors = pivot(u, v)
        assert torch.allclose(factors.dense(), u @ v, atol=1e-10)
        assert parameters(factors) == pivoted_parameters(shape, rank)
        assert factors.ranks == (rank,)
        assert torch.equal(factors.dense()[factors.rows_R.long()], factors.basis_RO)


def test_full_rank_costs_the_matrix_and_its_row_numbers():
    assert pivoted_parameters((12, 7), 7) == 12 * 7 + 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_pivoted_factors_are_float32_or_wider(dtype):
    factors = pivot(randn(9, 3).to(dtype), randn(3, 5).to(dtype))
    want = torch.promote_types(dtype, torch.float32)
    assert (factors.basis_RO.dtype, factors.mix_XR.dtype) == (want, want)


def test_rows_are_numbered_on_the_device_of_the_pivots():
    chosen_R = torch.empty(2, dtype=torch.long, device="meta")
    assert pivoted._others(chosen_R, 5).device == chosen_R.device


def test_pivots_keep_weights_small_where_leading_rows_are_bad():
    u = randn(200, 40)
    u[:40] *= 1e-9  # the first rows would be a useless basis
    factors = pivot(u, randn(40, 60, seed=1))
    assert float(factors.mix_XR.abs().max()) < 20


def test_pivoted_factors_survive_storage_and_narrow_floats():
    factors = pivot(randn(300, 8), randn(8, 20, seed=1))
    narrow = cast(factors, torch.bfloat16)
    again = FACTORS["pivoted-low-rank"].from_tensors(narrow.tensors())
    assert isinstance(again, PivotedLowRank)
    assert torch.equal(again.rows_R, factors.rows_R)  # 257 and more are no bfloat16 numbers
    dense = factors.dense()
    assert float((again.dense() - dense).norm() / dense.norm()) < 1e-2


def test_what_reads_checkpoints_knows_the_kind():
    """In a fresh process, where nothing was fitted."""
    code = (
        "import tensorllm.checkpoint.manifest;"
        "from tensorllm.tensors.factors import FACTORS; assert 'pivoted-low-rank' in FACTORS;"
        "from tensorllm.tensors.stacking import STACKINGS; assert 'rows-in-gate' in STACKINGS"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def cost(e: Tensor, rows: Tensor, columns: Tensor) -> float:
    return float(torch.trace(rows @ e @ columns @ e.mT))


@pytest.mark.parametrize("shape", SHAPES)
def test_weighted_svd_costs_what_it_says_and_beats_its_neighbours(shape):
    w, rows, columns = randn(*shape), moment(shape[0], 90, 1), moment(shape[1], 90, 2)
    found = weighted_svd(w, Metric(rows), Metric(columns))
    errors = left_out(w, Metric(rows), Metric(columns))
    small = min(shape)
    shapes = [(shape[0], small), (small,), (small, shape[1])]
    assert [tuple(part.shape) for part in found] == shapes
    assert errors.shape == (small,)
    before = torch.cat((found.costs_S.sum()[None], errors[:-1]))
    assert torch.allclose(before - found.costs_S, errors, atol=1e-9)
    for rank in range(1, min(shape) + 1):
        u, v = found.truncate(rank)
        left = cost(w - u @ v, rows, columns)
        assert left == pytest.approx(float(errors[rank - 1]), rel=1e-3, abs=1e-4)
        for seed in range(5):
            nearby = (u + 1e-2 * randn(*u.shape, seed=seed)) @ (v + 1e-2 * randn(*v.shape, seed=9))
            assert left <= cost(w - nearby, rows, columns) + 1e-9


def test_weighted_svd_with_plain_moments_is_the_svd():
    w = randn(8, 6)
    costs = weighted_svd(w, Metric(torch.eye(8)), Metric(torch.eye(6))).costs_S
    assert torch.allclose(costs.sqrt(), torch.linalg.svdvals(w), rtol=1e-5)


@pytest.mark.parametrize("samples", [0, 1, 3])
def test_moments_of_too_little_text_are_no_trouble(samples):
    columns = moment(6, samples, 3) if samples else torch.zeros(6, 6).double()
    u, v = weighted_svd(randn(8, 6), Metric(torch.zeros(8, 8)), Metric(columns)).truncate(
        min(6, samples + 1)
    )
    assert torch.isfinite(u @ v).all()
    x = randn(samples, 6, seed=3)
    assert torch.allclose(x @ (u @ v).mT, x @ randn(8, 6).mT, atol=1e-2)


def test_regression_is_ridge_regression():
    x, y, prior = randn(200, 5), randn(200, 3, seed=1), randn(3, 5, seed=2)
    ridge = 0.1
    found = regression(y.mT @ x / 200, x.mT @ x / 200, prior, ridge)
    added = ridge * float((x**2).sum() / 200 / 5)
    stacked_x = torch.cat((x / 200**0.5, added**0.5 * torch.eye(5).double()))
    stacked_y = torch.cat((y / 200**0.5, added**0.5 * prior.mT))
    assert torch.allclose(found, torch.linalg.lstsq(stacked_x, stacked_y).solution.mT)
    assert torch.allclose(regression(prior @ (x.mT @ x), x.mT @ x, prior, ridge), prior)
    nothing = torch.zeros(3, 5).double(), torch.zeros(5, 5).double()  # seen: the prior stays
    assert torch.allclose(regression(*nothing, prior, ridge), prior)


def curves(seed: int, sizes: list[tuple[int, int]]) -> list[Curve]:
    out = []
    for n, (rows, columns) in enumerate(sizes):
        count = min(rows, columns)
        values = randn(count, seed=100 * seed + n).abs().sort(descending=True).values ** 3
        tails = values.flip(0).cumsum(0).flip(0)
        costs = [pivoted_parameters((rows, columns), r) for r in range(1, count + 1)]
        out.append(Curve(torch.tensor(costs), torch.cat((tails[1:], tails.new_zeros(1)))))
    return out


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.3, 1.1))
def test_no_allocation_is_better_than_the_one_that_is_found(seed, share):
    """Brute force over ways and ranks: the best is at most 1 % of the error at rank 1 better."""
    a, b, ab = curves(seed, [(24, 16), (12, 16), (36, 16)])
    clusters = [[[a, b], [ab]], [curves(seed + 1, [(16, 16)])]]
    budget = int(share * 16 * (24 + 12 + 16))
    best = math.inf
    for way, other in itertools.product(*clusters):
        every = [*way, *other]
        costs, errors = (
            sum(torch.meshgrid(*part, indexing="ij"))
            for part in ([c.cost_S for c in every], [c.error_S for c in every])
        )
        best = min(best, float(errors[costs <= budget].min()))
    found = allocate(clusters, budget)
    ways = [cluster[choice.way] for cluster, choice in zip(clusters, found, strict=True)]
    spent = sum(
        int(c.cost_S[rank - 1])
        for way, choice in zip(ways, found, strict=True)
        for c, rank in zip(way, choice.ranks, strict=True)
    )
    whole = sum(float(c.error_S[0]) for c in [a, b, clusters[1][0][0]])
    assert spent <= budget
    assert error_of(clusters, found) <= best + 0.01 * whole


def test_a_budget_below_rank_one_is_refused():
    with pytest.raises(UserError, match="store 29 numbers, more than the 10 asked for"):
        allocate([[curves(0, [(9, 8)])], [curves(0, [(6, 6)])]], 10)
