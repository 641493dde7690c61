"""Passes in memory order against einsum: every order of modes in memory, cut into small pieces."""

import itertools

import pytest
import torch
from torch import Tensor

from tensorllm.tensors import unfold

SIZES = (7, 5, 4, 3)
ORDERS = list(itertools.permutations(range(4)))


def laid_out(order: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """A random tensor of SIZES whose modes lie in memory in this order."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn([SIZES[n] for n in order], generator=generator).to(dtype)
    return w.permute(sorted(range(4), key=order.__getitem__))


@pytest.fixture(params=["whole", "pieces", "wide"])
def sizes_of_pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the branches that only large tensors take on small ones."""
    if request.param != "whole":
        monkeypatch.setattr(unfold, "CHUNK", 20)
        monkeypatch.setattr(unfold, "ROW", 3)
    if request.param == "wide":
        monkeypatch.setattr(unfold, "NARROW", 4)
        monkeypatch.setattr(unfold, "FOLDED", 8)


@pytest.mark.usefixtures("sizes_of_pieces")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_grams(order: tuple[int, ...], dtype: torch.dtype) -> None:
    w = laid_out(order, dtype)
    assert w.shape == SIZES
    for mode, size in enumerate(SIZES):
        first = w.double().movedim(mode, 0).flatten(1)
        want = first @ first.mT
        torch.testing.assert_close(unfold.gram(w, mode, torch.float64), want)
        got = unfold.gram(w, mode, torch.float32)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert got.dtype == torch.float64
        u_NR = torch.randn(size, 2)
        product = unfold.project(w, u_NR, mode)
        want = torch.tensordot(w.float(), u_NR, dims=([mode], [0])).movedim(-1, mode)
        torch.testing.assert_close(product, want, rtol=1e-5, atol=1e-5)
        assert unfold.in_memory_order(product)[1] == unfold.in_memory_order(w)[1]
        rows = unfold.unfolding(w, mode)
        torch.testing.assert_close((rows @ rows.mT).double(), first @ first.mT, rtol=0.02, atol=0.1)


@pytest.mark.usefixtures("sizes_of_pieces")
@pytest.mark.parametrize("order", ORDERS[::5])
def test_energies(order: tuple[int, ...]) -> None:
    w, other = laid_out(order), laid_out(ORDERS[7]) * 0.9
    assert unfold.energy(w) == pytest.approx(float(w.double().square().sum()), rel=1e-6)
    want = float((w.double() - other.double()).square().sum())
    assert unfold.residual_energy(w, other) == pytest.approx(want, rel=1e-6)


def test_residuals_are_summed_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of about 80 numbers here, or of one index of the first mode in memory."""
    pieces: list[int] = []

    def energy(w: Tensor) -> float:
        pieces.append(w.numel())
        return float(w.double().square().sum())

    monkeypatch.setattr(unfold, "energy", energy)
    monkeypatch.setattr(unfold, "CHUNK", 20)
    for sizes, want in (((9, 5, 4), [80, 80, 20]), ((2, 9, 10), [90, 90])):
        w, other = torch.randn(sizes), torch.randn(sizes)
        left = float((w - other).double().square().sum())
        assert unfold.residual_energy(w, other) == pytest.approx(left)
        assert pieces == want
        pieces.clear()


def test_gaps_and_repeats_in_memory() -> None:
    whole = torch.randn(6, 5, 4)
    for w in (whole[::2], whole[:, 1:3], whole[:, :1].expand(6, 5, 4), whole[:1, :, :1]):
        for mode in range(3):
            first = w.movedim(mode, 0).flatten(1)
            got = unfold.gram(w, mode, torch.float64)
            torch.testing.assert_close(got, first.double() @ first.double().mT)
        assert unfold.energy(w) == pytest.approx(float(w.double().square().sum()))


def test_sums_of_many_numbers_do_not_drift() -> None:
    """One float32 sum of so many equal squares is off by a per cent."""
    w = torch.ones(1 << 22).mul_(0.1)
    want = float(w[0].double() ** 2) * w.numel()
    assert unfold.energy(w) == pytest.approx(want, rel=1e-5)
    for mode in (0, 1):
        thin = w.view(2, -1) if mode == 0 else w.view(-1, 2)
        got = float(unfold.gram(thin, mode, torch.float32).trace())
        assert got == pytest.approx(want, rel=2e-5)


@pytest.mark.parametrize("scale", [1e-24, 1e24])
def test_energy_where_float32_squares_vanish_or_overflow(scale: float) -> None:
    w = torch.randn(10_000) * scale
    assert unfold.energy(w) == pytest.approx(float(w.double().square().sum()), rel=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_all_finite(value: float) -> None:
    w = laid_out(ORDERS[9])
    assert unfold.all_finite(w)
    w[3, 2, 1, 0] = value
    assert not unfold.all_finite(w)


def test_reduced_precision_of_the_process_is_left_out_and_left_alone() -> None:
    w = torch.randn(64, 64)
    want = unfold.gram(w, 0, torch.float32)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(unfold.gram(w, 0, torch.float32), want)
        with unfold.exact_float32():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
