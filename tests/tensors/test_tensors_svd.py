"""Truncated SVD against torch.linalg.svd in float64."""

from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from tensorllm.errors import UserError
from tensorllm.tensors.eigen import all_singular_values
from tensorllm.tensors.svd import truncated_svd

SPECTRA = {
    "flat": torch.ones(60),
    "decaying": torch.arange(1, 61) ** -1.0,
    "steep": torch.arange(1, 61) ** -3.0,
    "six decades": torch.logspace(0, -6, 60),
    "twelve decades": torch.logspace(0, -12, 60, dtype=torch.float64),
    "low rank": torch.cat([torch.linspace(1, 0.01, 20), torch.zeros(40)]),
    "steps": torch.tensor([1.0] * 10 + [1e-2] * 20 + [1e-5] * 30),
}


def with_spectrum(singular_S: Tensor, rows: int, columns: int) -> Tensor:
    torch.manual_seed(0)
    size = len(singular_S)
    u = torch.linalg.qr(torch.randn(rows, size, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(columns, size, dtype=torch.float64)).Q
    return (u * singular_S.double()) @ v.mT


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(60, 200), (200, 60)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_as_good_as_an_svd(spectrum: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    w_IO = with_spectrum(SPECTRA[spectrum], *shape).to(dtype)
    exact = torch.linalg.svdvals(w_IO.double())
    unit = 3e-15 if dtype == torch.float64 else 5e-8
    for rank in (1, 10, 20, 45, 60):
        factors = truncated_svd(w_IO, rank)
        assert factors.u_IR.shape == (shape[0], rank)
        assert factors.v_RO.shape == (rank, shape[1])
        product = factors.u_IR.double() @ factors.v_RO.double()
        error, best = (w_IO.double() - product).norm(), exact[rank:].norm()
        # Beside the rank's own error there is that of storing factors in their dtype.
        assert error <= (1 + 1e-6) * best + 4 * unit * exact.norm()


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_singular_values(spectrum: str) -> None:
    for shape in ((60, 200), (200, 60)):
        w_IO = with_spectrum(SPECTRA[spectrum], *shape)
        torch.testing.assert_close(
            all_singular_values(w_IO, 0), torch.linalg.svdvals(w_IO), rtol=1e-4, atol=1e-14
        )
        w_IO = w_IO.float()
        torch.testing.assert_close(
            all_singular_values(w_IO, 0), torch.linalg.svdvals(w_IO.double()), rtol=1e-4, atol=1e-7
        )


def test_low_rank_is_not_lost_to_rounding() -> None:
    """Past rank 30 there is 1e-9; the float32 Gram matrix shows 1e-4, and would lose 4e-7."""
    spectrum = torch.cat([torch.linspace(1, 0.01, 30), torch.full((270,), 1e-9)])
    w_IO = with_spectrum(spectrum, 300, 2000).float()
    factors = truncated_svd(w_IO, 30)
    error = (w_IO.double() - factors.u_IR.double() @ factors.v_RO.double()).norm()
    assert error <= 1.5e-7 * w_IO.norm()


def test_large_gram_matrices_take_the_float32_eigensolver() -> None:
    torch.manual_seed(0)
    w_IO = torch.randn(1100, 1300)
    exact = torch.linalg.svdvals(w_IO.double())[200:].norm()
    error = (w_IO - truncated_svd(w_IO, 200).dense()).double().norm()
    assert error <= exact * (1 + 1e-6)


def test_singular_values_are_shared_evenly() -> None:
    factors = truncated_svd(with_spectrum(SPECTRA["decaying"], 60, 200), 10)
    share = SPECTRA["decaying"][:10].double().sqrt()
    torch.testing.assert_close(factors.u_IR.norm(dim=0), share)
    torch.testing.assert_close(factors.v_RO.norm(dim=1), share)


@pytest.mark.parametrize("method", ["exact", "randomized", "official"])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_both_factors_carry_as_much_of_each_value(method: str, scale: float) -> None:
    w_IO = scale * with_spectrum(SPECTRA["decaying"], 60, 200).mT  # the columns are the short side
    factors = truncated_svd(w_IO, 10, method)
    torch.testing.assert_close(factors.u_IR.norm(dim=0), factors.v_RO.norm(dim=1))
    of_zero = truncated_svd(torch.zeros(4, 6), 2, method)
    assert of_zero.u_IR.isfinite().all()
    assert of_zero.v_RO.isfinite().all()


@pytest.mark.parametrize("method", ["exact", "randomized", "official"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_factors_are_float32_or_wider(method: str, dtype: torch.dtype) -> None:
    w_IO = with_spectrum(SPECTRA["decaying"], 60, 200).to(dtype)
    factors = truncated_svd(w_IO, 10, method)
    want = torch.promote_types(dtype, torch.float32)
    assert (factors.u_IR.dtype, factors.v_RO.dtype) == (want, want)


@pytest.mark.parametrize(("method", "excess"), [("randomized", 1.01), ("official", 1.2)])
def test_random_methods_are_seeded_and_near_the_best(method: str, excess: float) -> None:
    w_IO = with_spectrum(SPECTRA["decaying"], 60, 200).float()
    state = torch.random.get_rng_state()
    first, again = (truncated_svd(w_IO, 10, method, seed=3).dense() for _ in range(2))
    other = truncated_svd(w_IO, 10, method, seed=4).dense()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    unseeded, zero = (truncated_svd(w_IO, 10, method, **s).dense() for s in ({}, {"seed": 0}))
    assert torch.equal(unseeded, zero)
    best = torch.linalg.svdvals(w_IO)[10:].norm()
    assert best * (1 - 1e-6) <= (w_IO - first).norm() <= best * excess


@pytest.mark.parametrize("method", ["randomized", "official"])
def test_on_the_cpu_no_gpu_is_touched(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forking the random state of every GPU would start them all."""
    forked, fork_rng = [], torch.random.fork_rng

    def watched(devices: list[torch.device]) -> AbstractContextManager[None]:
        forked.append(devices)
        return fork_rng(devices)

    monkeypatch.setattr(torch.random, "fork_rng", watched)
    truncated_svd(torch.ones(4, 3), 1, method)
    assert forked == [[]]


def test_official_is_what_laser_runs() -> None:
    w_IO = torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        u, s, v = torch.svd_lowrank(w_IO, q=8, niter=2)
    got = truncated_svd(w_IO, 8, "official", seed=5).dense()
    torch.testing.assert_close(got, u @ torch.diag(s) @ v.T)


@pytest.mark.parametrize(("rank", "more"), [(10, 16), (41, 20)])
def test_randomized_draws_half_as_many_directions_more(rank: int, more: int) -> None:
    w_IO = with_spectrum(SPECTRA["decaying"], 80, 90).float()
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        u, s, v = torch.svd_lowrank(w_IO, q=rank + more, niter=4)
    want = u[:, :rank] @ torch.diag(s[:rank]) @ v[:, :rank].T
    got = truncated_svd(w_IO, rank, "randomized", seed=5).dense()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-12, 1e12, 1e25])
def test_any_scale(value: float) -> None:
    torch.manual_seed(0)
    w_IO = torch.randn(12, 30)
    want = truncated_svd(w_IO, 5).dense()
    got = truncated_svd(w_IO * value, 5).dense()
    torch.testing.assert_close(got, want * value, rtol=1e-3, atol=1e-5 * value)


@pytest.mark.parametrize(
    ("shape", "rank", "method", "said"),
    [
        ((5, 7), 6, "exact", "rank r must be in 1..5"),
        ((5, 7), 0, "exact", "1..5"),
        ((5, 7), 2.0, "exact", "integer"),
        ((5, 7, 2), 1, "exact", "matrix"),
        ((5, 7), 1, "exakt", "one of exact, randomized, official, got 'exakt'"),
    ],
)
def test_bad_input(shape: tuple[int, ...], rank: int, method: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        truncated_svd(torch.ones(shape), rank, method)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["exact", "randomized", "official"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_not_finite(value: float, method: str, dtype: torch.dtype) -> None:
    w_IO = torch.ones(5, 7, dtype=dtype)
    w_IO[2, 3] = value
    with pytest.raises(UserError, match="finite"):
        truncated_svd(w_IO, 2, method)
    with pytest.raises(UserError, match="finite"):
        all_singular_values(w_IO, 0)
