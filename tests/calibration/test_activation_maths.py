"""The maths under data-aware compression against brute force and plain formulas.

Shapes: I rows, O columns, R rank, S ranks of a curve.
"""

import itertools
import math

import forked
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tensorllm.errors import UserError
from tensorllm.tensors import pivoted
from tensorllm.tensors.allocation import Curve, allocate, error_of
from tensorllm.tensors.eigen import leading_subspace
from tensorllm.tensors.factors import FACTORS, cast, parameters
from tensorllm.tensors.pivoted import PivotedLowRank, pivot, pivoted_parameters
from tensorllm.tensors.weighted import (
    Metric,
    between_roots,
    projection,
    projection_error,
    regression,
    truncation_errors,
)

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


def test_pivots_of_large_rank_are_as_exact_as_float32():
    """With columns that decay, as those of fitted factors do; factors of float64 keep it."""
    sizes = torch.logspace(0, -4, 1100).double()
    u, v = randn(1500, 1100) * sizes, randn(1100, 300, seed=1)
    for dtype, allowed in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        factors = pivot(u.to(dtype), v.to(dtype))
        assert factors.mix_XR.dtype == dtype
        left_over = factors.dense().double() - u @ v
        assert float(left_over.norm() / (u @ v).norm()) < allowed


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
    forked.run(["-c", code], bare=True, check=True)


def cost(e: Tensor, rows: Tensor, columns: Tensor) -> float:
    return float(torch.trace(rows @ e @ columns @ e.mT))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("writes", [False, True])
def test_a_projection_costs_what_it_says_and_is_the_svd_between_both_roots(shape, writes):
    """Against the truncated SVD between the roots of both covariances, the wide one included."""
    outputs, inputs = moment(shape[0], 90, 1), moment(shape[1], 90, 2)
    w_MX = randn(*shape)
    metric = Metric(outputs if writes else inputs)
    propagated = w_MX @ inputs @ w_MX.mT if writes else w_MX.mT @ outputs @ w_MX
    errors = truncation_errors(metric.weighted(propagated), min(shape))
    assert errors.shape == (min(shape),)
    left, right = (torch.linalg.cholesky(m) for m in (outputs, inputs))
    for rank in range(1, min(shape) + 1):
        into, back = projection(metric, propagated, rank)
        found = (into @ back).mT @ w_MX if writes else w_MX @ into @ back
        u, s, v = torch.linalg.svd(left.mT @ w_MX @ right, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        wanted = torch.linalg.solve(left.mT, best) @ torch.linalg.inv(right)
        assert torch.allclose(found, wanted, atol=1e-3)
        left_over = cost(w_MX - found, outputs, inputs)
        assert left_over == pytest.approx(float(s[rank:].square().sum()), rel=1e-3, abs=1e-4)
        assert left_over == pytest.approx(float(errors[rank - 1]), rel=1e-3, abs=1e-4)


def test_large_covariances_give_the_same_subspace_in_float32():
    """Beyond order 1,024 eigenvectors are taken in float32 where their rounding costs little."""
    size, rank = 1100, 40
    q = torch.linalg.qr(randn(size, size)).Q
    values = torch.logspace(0, -6, size, dtype=torch.float64)
    values[:rank] *= 100
    propagated = (q * values) @ q.mT
    metric = Metric(torch.eye(size, dtype=torch.float64), 0.0)
    into, back = (half.double() for half in projection(metric, propagated, rank))
    assert torch.allclose(into @ back, q[:, :rank] @ q[:, :rank].mT, atol=1e-5)
    errors = truncation_errors(metric.weighted(propagated), size)
    assert torch.allclose(errors[:-1], values.flip(0).cumsum(0).flip(0)[1:], atol=1e-4)


def test_a_basis_costs_what_its_map_misses_and_a_sketch_little_more():
    """Of a spectrum that decays, below and from order 1,024 on."""
    for size in (40, 1100):
        propagated = moment(size, 3 * size, 1) @ torch.diag(torch.logspace(0, -3, size).double())
        propagated = propagated @ propagated.mT
        metric = Metric(moment(size, 3 * size, 2))
        weighted, rank = metric.weighted(propagated), size // 2
        basis = leading_subspace(weighted, rank)
        assert torch.allclose(basis.mT @ basis, torch.eye(rank).to(basis), atol=1e-5)
        into, back = (half.double() for half in between_roots(metric, basis))
        missed = torch.eye(size).double() - into @ back
        wanted = float(torch.trace(missed.mT @ propagated @ missed @ metric.covariance_NN))
        assert projection_error(weighted, basis) == pytest.approx(wanted, rel=1e-3)
        best = float(truncation_errors(weighted, size)[rank - 1])
        assert best * (1 - 1e-3) < projection_error(weighted, basis) < 3 * best
    assert projection_error(weighted, torch.eye(size).double()) == pytest.approx(
        0.0, abs=1e-9 * float(weighted.trace())
    )


def test_where_nothing_costs_a_basis_misses_nothing():
    assert projection_error(torch.zeros(5, 5).double(), torch.eye(5)[:, :2].double()) == 0.0


def test_behind_a_map_a_projection_comes_with_it():
    inputs, propagated, map_DD = moment(7, 40, 1), moment(7, 40, 2), randn(7, 7, seed=3)
    metric = Metric(inputs)
    plain = projection(metric, map_DD.mT @ propagated @ map_DD, 3)
    into, back = projection(metric, propagated, 3, metric.times_root(map_DD))
    assert torch.allclose(into @ back, map_DD @ plain.into_NR @ plain.back_RN)


def test_wide_regressions_and_roots_are_as_exact_as_float32():
    size = 1100
    seen, cross = moment(size, 3 * size, 1), moment(size, 3 * size, 1) + moment(size, size, 2)
    ridge = 1e-2 * float(seen.diagonal().mean()) * torch.eye(size).double()
    found = regression(cross, seen, 1e-2)
    wanted = torch.linalg.solve(seen + ridge, (cross + ridge).mT).mT
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    root = Metric(seen, 1e-6).root
    assert root.dtype == torch.float32
    assert float((root.double() @ root.double().mT - seen).norm() / seen.norm()) < 1e-5
    flat = torch.ones(size, size).double()  # of rank 1: float32 makes it indefinite
    assert Metric(flat, 1e-8).root.dtype == torch.float64
    tiny = Metric(1e-42 * seen, 1e-6).root  # its squares underflow in float32
    assert float((tiny / 1e-21 - root).norm() / root.norm()) < 1e-5
    nothing = Metric(torch.zeros(size, size).double(), 1e-6).root
    assert torch.equal(nothing.double(), torch.eye(size).double())


@pytest.mark.parametrize("samples", [0, 1, 3])
def test_moments_of_too_little_text_are_no_trouble(samples):
    inputs = moment(6, samples, 3) if samples else torch.zeros(6, 6).double()
    w_MX = randn(8, 6)
    into, back = projection(Metric(inputs), torch.zeros(6, 6).double(), min(6, samples + 1))
    assert torch.isfinite(into @ back).all()
    into, back = projection(Metric(inputs), w_MX.mT @ w_MX, min(6, samples + 1))
    x = randn(samples, 6, seed=3)
    assert torch.allclose(x @ (w_MX @ into @ back).mT, x @ w_MX.mT, atol=1e-2)


def test_an_indefinite_covariance_is_raised_until_it_has_a_root():
    rounded = torch.diag(torch.tensor([1.0, 1e-9, -1e-5])).double()
    root = Metric(rounded).root
    assert torch.isfinite(root).all()
    assert torch.allclose(root @ root.mT, rounded, atol=1e-3)


def test_regression_is_ridge_regression():
    x, y = randn(200, 5), randn(200, 5, seed=1)
    ridge, prior = 0.1, torch.eye(5).double()
    found = regression(y.mT @ x / 200, x.mT @ x / 200, ridge)
    added = ridge * float((x**2).sum() / 200 / 5)
    stacked_x = torch.cat((x / 200**0.5, added**0.5 * prior))
    stacked_y = torch.cat((y / 200**0.5, added**0.5 * prior))
    assert torch.allclose(found, torch.linalg.lstsq(stacked_x, stacked_y).solution.mT)
    assert torch.allclose(regression(x.mT @ x, x.mT @ x, ridge), prior)
    nothing = torch.zeros(5, 5).double()  # seen: what is there stays
    assert torch.allclose(regression(nothing, nothing, ridge), prior)


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
    """Brute force over groupings and ranks: the best is at most 1 % of the error at rank 1
    better."""
    a, b, ab = curves(seed, [(24, 16), (12, 16), (36, 16)])
    clusters = [[[a, b], [ab]], [curves(seed + 1, [(16, 16)])]]
    budget = int(share * 16 * (24 + 12 + 16))
    best = math.inf
    for grouping, other in itertools.product(*clusters):
        every = [*grouping, *other]
        costs, errors = (
            sum(torch.meshgrid(*part, indexing="ij"))
            for part in ([c.cost_S for c in every], [c.error_S for c in every])
        )
        best = min(best, float(errors[costs <= budget].min()))
    found = allocate(clusters, budget)
    chosen = [cluster[choice.grouping] for cluster, choice in zip(clusters, found, strict=True)]
    spent = sum(
        int(c.cost_S[rank - 1])
        for grouping, choice in zip(chosen, found, strict=True)
        for c, rank in zip(grouping, choice.ranks, strict=True)
    )
    whole = sum(float(c.error_S[0]) for c in [a, b, clusters[1][0][0]])
    assert spent <= budget
    assert error_of(clusters, found) <= best + 0.01 * whole


def test_a_budget_below_rank_one_is_refused():
    with pytest.raises(UserError, match="store 29 numbers, more than the 10 asked for"):
        allocate([[curves(0, [(9, 8)])], [curves(0, [(6, 6)])]], 10)
