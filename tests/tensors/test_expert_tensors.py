"""The maths of experts as one tensor, against float64 references that loop over experts.

Shapes: E experts, F inner width, D model width, S matrices, R rank.
"""

import pytest
import torch
from torch import Tensor

from tensorllm.tensors.experts import (
    EXPERTS,
    INNER,
    WIDTH,
    ranks_within,
    refitted,
    root_of,
    size_curve,
    stored_numbers,
    weighted_tucker,
)
from tensorllm.tensors.tucker import tucker

SHAPE = (5, 6, 9, 2)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(size: int, seed: int) -> Tensor:
    """With eigenvalues over three orders of magnitude."""
    x = rand(4 * size, size, seed=seed) * torch.logspace(0, -1.5, size, dtype=torch.float64)
    return x.mT @ x / len(x)


def planted(ranks: tuple[int, ...], seed: int = 0) -> Tensor:
    w = rand(*ranks, seed=seed)
    for mode, (size, rank) in enumerate(zip(SHAPE, ranks, strict=True)):
        factor = torch.linalg.qr(rand(size, rank, seed=seed + mode + 1)).Q
        w = torch.movedim(torch.tensordot(factor, w, ([1], [mode])), 0, mode)
    return w


ROOTS = {
    WIDTH: root_of(covariance(9, 1)),
    INNER: root_of(covariance(6, 2)),
    EXPERTS: torch.tensor([1.0, 2.0, 0.1, 1.0, 0.5], dtype=torch.float64).diag(),
}


@pytest.mark.parametrize("ranks", [(5, 6, 4, 2), (3, 6, 4, 1), (2, 3, 4, 2), (5, 4, 9, 2)])
@pytest.mark.parametrize("roots", [{}, ROOTS], ids=["plain", "weighted"])
def test_planted_ranks_are_recovered(ranks: tuple[int, ...], roots: dict[int, Tensor]) -> None:
    w = planted(ranks)
    found = weighted_tucker(w, ranks, roots)
    torch.testing.assert_close(found.dense(), w, rtol=0, atol=1e-9)
    assert sum(t.numel() for t in found.tensors().values()) == stored_numbers(SHAPE, ranks)
    for factor in found.factors.values():
        eye = torch.eye(factor.shape[1], dtype=torch.float64)
        torch.testing.assert_close(factor.mT @ factor, eye, rtol=0, atol=1e-10)


def test_full_modes_have_no_factor() -> None:
    assert weighted_tucker(rand(*SHAPE), (5, 6, 4, 2), {}).factors.keys() == {WIDTH}
    assert weighted_tucker(rand(*SHAPE), SHAPE, ROOTS).factors == {}


def test_one_weighted_mode_reaches_the_best_weighted_error() -> None:
    """The error is that of the discarded eigenvalues of the weighted Gram matrix."""
    w, c_DD = rand(*SHAPE), covariance(9, 1)
    found = weighted_tucker(w, (5, 6, 4, 2), {WIDTH: root_of(c_DD)}).dense()
    scale = 9 / c_DD.trace()  # a root has a mean eigenvalue of one

    def error(approximation: Tensor) -> float:
        total = 0.0
        for e in range(5):
            for s in range(2):
                left_FD = w[e, :, :, s] - approximation[e, :, :, s]
                total += float(torch.trace(left_FD @ c_DD @ left_FD.mT)) * float(scale)
        return total

    rows = w.permute(0, 1, 3, 2).reshape(-1, 9)
    values, vectors = torch.linalg.eigh(c_DD)
    half = vectors @ (values.sqrt().diag()) @ vectors.mT
    discarded = torch.linalg.eigvalsh(half @ rows.mT @ rows @ half)[:5].sum() * scale
    assert error(found) == pytest.approx(float(discarded), rel=1e-6)
    assert error(found) < error(tucker(w, {WIDTH: 4}).dense())


def test_own_inner_roots_weigh_each_expert_by_its_own() -> None:
    """Rank 4 of the width: the best subspace for the summed outputs' covariance of all experts."""
    w = rand(5, 6, 9, 1)
    own = [covariance(6, seed) * (seed + 1) for seed in range(5)]
    roots = torch.stack([root_of(c, mean=1.0) for c in own])
    found = weighted_tucker(w, (5, 6, 4, 1), {INNER: roots})
    outputs_DD = sum(w[e, :, :, 0].mT @ own[e] @ w[e, :, :, 0] for e in range(5))
    assert isinstance(outputs_DD, Tensor)
    want = torch.linalg.eigh(outputs_DD).eigenvectors[:, -4:]
    u = found.factors[WIDTH]
    torch.testing.assert_close(u @ u.mT, want @ want.mT, rtol=0, atol=1e-6)
    want_EFDS = torch.einsum("efds,dg->efgs", w, u @ u.mT)
    torch.testing.assert_close(found.dense(), want_EFDS, rtol=0, atol=1e-9)


@pytest.mark.parametrize("inner", [6, 4])
def test_refitted_cores_are_least_squares(inner: int) -> None:
    w, own = rand(*SHAPE), [covariance(9, seed) for seed in range(5)]
    before = weighted_tucker(w, (5, inner, 4, 2), {WIDTH: root_of(covariance(9, 7))})
    after = refitted(w, before, lambda expert: own[expert])
    u_DR, u_FB = after.factors[WIDTH], after.factors.get(INNER, torch.eye(6).double())
    for e in range(5):
        half = torch.linalg.cholesky(own[e])
        for s in range(2):
            target = (u_FB.mT @ w[e, :, :, s] @ half).mT
            core = torch.linalg.lstsq((u_DR.mT @ half).mT, target).solution.mT
            torch.testing.assert_close(after.core[e, :, :, s], core, rtol=0, atol=1e-8)


def test_curve_tells_cost_and_error_of_each_size() -> None:
    w = planted((5, 6, 4, 1)) + 0.1 * rand(*SHAPE, seed=9)
    curve, ranks_NC = size_curve(w, {}, (0, 1, 2, 3))
    assert ranks_NC[-1].tolist() == [0, 0, 0, 0]
    assert curve.cost_S[-1] == w.numel()
    assert (curve.cost_S.diff() > 0).all()
    assert (curve.error_S.diff() < 0).all()
    scale = w.numel() / w.square().sum()
    for n in range(0, len(ranks_NC) - 1, 7):
        ranks = tuple(ranks_NC[n].tolist())
        found = weighted_tucker(w, ranks, {}, sweeps=0)
        assert stored_numbers(SHAPE, ranks) == int(curve.cost_S[n])
        # the curve's blocks are of a plain HOSVD; sequential truncation is as good or better
        assert (w - found.dense()).square().sum() * scale <= curve.error_S[n] * (1 + 1e-6) + 1e-9


def test_ranks_within_a_share() -> None:
    w = planted((5, 6, 4, 1)) + 0.01 * rand(*SHAPE, seed=9)
    found = size_curve(w, {}, (0, 1, 2, 3))
    enough = stored_numbers(SHAPE, (5, 6, 4, 1))
    assert ranks_within(found, enough) == (5, 6, 4, 1)
    assert ranks_within(found, 1) is None


def test_a_mode_that_may_not_be_compressed_is_not() -> None:
    _, ranks_NC = size_curve(rand(*SHAPE), {}, (WIDTH,))
    assert {tuple(r[:2]) for r in ranks_NC[:-1].tolist()} == {(5, 6)}


def test_nothing_known_weighs_alike() -> None:
    assert torch.equal(root_of(torch.zeros(3, 3)), torch.eye(3, dtype=torch.float64))
