"""Passes in memory order against einsum: every order of modes in memory, cut into small pieces."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_grams(dtype: torch.dtype) -> None:
    for order in ORDERS:
        w = laid_out(order, dtype)
        assert w.shape == SIZES
        products_and_grams(w)


def products_and_grams(w: torch.Tensor) -> None:
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
    wide = w.double() / 3
    assert unfold.energy(wide) == pytest.approx(float(wide.square().sum()), rel=1e-13)


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
    with pytest.raises(ValueError, match="zip"):
        unfold.residual_energy(torch.ones(2, 90), torch.ones(3, 90))


@pytest.mark.parametrize(
    ("sizes", "size", "want"),
    [
        ((6, 4, 5), 120, [(6, 4, 5)]),
        ((5, 4, 5), 59, [(2, 4, 5), (2, 4, 5), (1, 4, 5)]),
        ((2, 4, 5), 20, [(1, 4, 5)] * 2),
        ((2, 4, 5), 19, [(1, 4, 4), (1, 4, 1)] * 2),  # one block is too large
        ((1, 7, 3), 5, [(1, 7, 1)] * 3),  # even one column is
    ],
)
def test_pieces_cover_all_once(
    sizes: tuple[int, ...], size: int, want: list[tuple[int, ...]]
) -> None:
    counts, shapes = torch.zeros(sizes), []
    for at_a, at_b in unfold._pieces(counts, size):
        counts[at_a, :, at_b] += 1
        shapes.append(tuple(counts[at_a, :, at_b].shape))
    assert shapes == want
    assert bool((counts == 1).all())


def test_narrow_blocks_are_folded_as_often_as_they_may_be() -> None:
    for long, short in itertools.product(range(1, 65), range(1, 20)):
        folds = (1, 2, 4, 8, 16)
        allowed = [f for f in folds if long % f == 0 and f * short <= unfold.FOLDED]
        assert unfold._fold(long, short) == max(allowed, default=1)


@pytest.mark.parametrize("order", ORDERS)
def test_any_order_in_memory_is_read_without_a_copy(order: tuple[int, ...]) -> None:
    w = laid_out(order)
    view, modes = unfold.in_memory_order(w)
    assert view.data_ptr() == w.data_ptr()
    assert view.is_contiguous()
    assert modes == list(order)


@pytest.mark.parametrize(
    ("sizes", "folded"),
    [
        ((8, 3, 4), (8, 12, 1)),  # columns beside each other
        ((8, 5, 6), (8, 10, 3)),
        ((8, 2, 3), (4, 12, 1)),  # else whole blocks, of no more than NARROW numbers
        ((4, 5, 3), (4, 15, 1)),
        ((4, 5, 5), (4, 5, 5)),
    ],
)
def test_how_thin_blocks_are_folded(
    sizes: tuple[int, ...], folded: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    plain_gram = unfold._plain_gram

    def watched(x_ANB: Tensor, dtype: torch.dtype) -> Tensor:
        seen.append(tuple(x_ANB.shape))
        return plain_gram(x_ANB, dtype)

    monkeypatch.setattr(unfold, "_plain_gram", watched)
    monkeypatch.setattr(unfold, "NARROW", 15)
    w = torch.randn(sizes, dtype=torch.float64)
    want = torch.einsum("anb,amb->nm", w, w)
    torch.testing.assert_close(unfold.gram(w, 1, torch.float64), want)
    assert seen == [folded]


@pytest.fixture
def sizes_asked_for(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What _pieces is told, where a chunk is 60 numbers."""
    asked: list[int] = []
    pieces = unfold._pieces

    def watched(x_ANB: Tensor, size: int) -> Iterator[tuple[slice, slice]]:
        asked.append(size)
        return pieces(x_ANB, size)

    monkeypatch.setattr(unfold, "_pieces", watched)
    monkeypatch.setattr(unfold, "CHUNK", 60)
    return asked


def test_how_much_a_gram_matrix_takes_at_once(sizes_asked_for: list[int]) -> None:
    shapes = [(40, 5, 1), (40, 6, 1), (4, 3, 5), (4, 3, 3), (2, 5, 30)]
    for shape in shapes:
        x_ANB = torch.randn(shape)
        want = torch.einsum("anb,amb->nm", x_ANB.double(), x_ANB.double())
        torch.testing.assert_close(unfold._plain_gram(x_ANB, torch.float64), want)
    # thin blocks together, at least twice as many numbers as the result has; wide ones singly
    assert sizes_asked_for == [60, 72, 15, 9, 60]


def test_how_much_a_product_takes_at_once(
    sizes_asked_for: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    widened, products = [], []
    widen, mm = unfold._times_identity, torch.mm
    monkeypatch.setattr(unfold, "NARROW", 20)
    monkeypatch.setattr(unfold, "_times_identity", lambda u, b: widened.append(b) or widen(u, b))
    monkeypatch.setattr(torch, "mm", lambda *two, out: products.append(1) or mm(*two, out=out))
    for shape, dtype in (
        ((7, 5, 4), torch.float32),
        ((2, 5, 2), torch.float32),
        ((7, 5, 5), torch.float32),
        ((1, 5, 4), torch.float32),
        ((7, 5, 1), torch.float32),
        ((90, 5, 3), torch.bfloat16),
    ):
        w, u_NR = torch.randn(shape).to(dtype), torch.randn(5, 2)
        want = torch.einsum("anb,nr->arb", w.float(), u_NR)
        torch.testing.assert_close(unfold.project(w, u_NR, 1), want)
    # what needs no conversion is taken whole
    assert sizes_asked_for == [7 * 20, 2 * 10, 7 * 25, 20, 7 * 5, 4 * 60]
    assert widened == [4, 2, 3]  # narrow blocks, of which there are several
    assert len(products) == 1 + 1 + 1 + 6  # of these, and of rows; the last in pieces of 16 blocks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_products_are_in_the_dtype_of_the_matrix(dtype: torch.dtype) -> None:
    w, u_NR = torch.randn(7, 5, 4), torch.randn(5, 2).to(dtype)
    got = unfold.project(w, u_NR, 1)
    assert got.dtype == dtype
    want = torch.einsum("anb,nr->arb", w.double(), u_NR.double())
    torch.testing.assert_close(got.double(), want, rtol=0.02, atol=0.05)


def test_results_are_on_the_device_of_the_tensor() -> None:
    for shape in ((6, 5, 4), (3, 4, 300)):
        w, u_NR = torch.empty(shape, device="meta"), torch.empty(shape[1], 2, device="meta")
        assert unfold.gram(w, 1, torch.float32).device == w.device
        assert unfold.project(w, u_NR, 1).device == w.device


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
    assert unfold.all_finite(w[:0])
    w[3, 2, 1, 0] = value
    assert not unfold.all_finite(w)


def test_reduced_precision_of_the_process_is_left_out_and_left_alone() -> None:
    w = torch.randn(64, 64)
    want = unfold.gram(w, 0, torch.float32)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(unfold.gram(w, 0, torch.float32), want)
        with unfold.exact_float32():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.fixture
def medium_precision() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


def precisions() -> set[str]:
    return {part.matmul.fp32_precision for part in (torch.backends.cuda, torch.backends.mkldnn)}


@pytest.mark.usefixtures("medium_precision")
def test_exact_products_end_with_the_outermost_context_and_after_an_error() -> None:
    before = precisions()
    assert before != {"ieee"}
    with unfold.exact_float32():
        with pytest.raises(ZeroDivisionError), unfold.exact_float32():
            assert 1 / 0
        assert precisions() == {"ieee"}
    assert precisions() == before
    with pytest.raises(ZeroDivisionError), unfold.exact_float32():
        assert 1 / 0
    assert precisions() == before


@pytest.mark.usefixtures("medium_precision")
def test_exact_products_of_threads_that_overlap_end_with_the_last() -> None:
    """Restoring what each had found would leave the setting of the first for ever."""
    before = precisions()
    first, second = unfold.exact_float32(), unfold.exact_float32()
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        one.submit(first.__enter__).result()
        other.submit(second.__enter__).result()
        one.submit(first.__exit__, None, None, None).result()
        assert precisions() == {"ieee"}
        other.submit(second.__exit__, None, None, None).result()
    assert precisions() == before


@pytest.mark.parametrize("width", [3, 1023, 1024, 1300])
def test_a_gram_matrix_of_columns_is_whole(width: int) -> None:
    x_NX = torch.randn(5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(unfold.gram_of_columns(x_NX), x_NX.mT @ x_NX)


@pytest.mark.parametrize("width", [3, 700, 1023, 1024, 1300])
def test_a_sum_of_gram_matrices_is_whole_once_it_is_mirrored(width: int) -> None:
    draws = torch.Generator().manual_seed(0)
    parts = [torch.randn(5, width, generator=draws) for _ in range(2)]
    total_XX = torch.zeros(width, width, dtype=torch.float64)
    for x_NX in parts:
        unfold.add_gram(total_XX, x_NX)
    assert unfold.mirror(total_XX) is total_XX
    wide_NX = torch.cat(parts).double()
    torch.testing.assert_close(total_XX, wide_NX.mT @ wide_NX, rtol=0, atol=1e-5)
    assert torch.equal(total_XX, total_XX.mT)
