"""What refusals say, to the letter, and the choices that speed alone would not show."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tensorllm.errors import UserError
from tensorllm.tensors import eigen
from tensorllm.tensors.allocation import Curve, allocate
from tensorllm.tensors.cp import cp
from tensorllm.tensors.eigen import require_finite
from tensorllm.tensors.factors import LowRank
from tensorllm.tensors.quantised import quantise
from tensorllm.tensors.ranks import check_ranks, laser_rank
from tensorllm.tensors.shared_input import rows_stacking
from tensorllm.tensors.stacking import STACKINGS, Geometry
from tensorllm.tensors.svd import truncated_svd
from tensorllm.tensors.tucker import truncate, tucker

PLAIN = Geometry(D=12, H=4, G=4, K=3, F=20, gated=True)
GROUPED = Geometry(D=12, H=4, G=2, K=3, F=20, gated=True)
W = torch.ones(6, 5, 4, 2)
OFFICIAL = (
    "layout 'official' is defined for square, ungrouped attention only (heads x head_dim = model "
    "width, as many KV heads as heads); this model has width 12, 4 heads of 3, 2 KV heads. Use "
    "layout 'paper'."
)
REFUSALS: list[tuple[Callable[[], Any], str]] = [
    (lambda: cp(W, 0), "the CP rank must be an integer, 1 or more, got 0"),
    (lambda: cp(W, True), "the CP rank must be an integer, 1 or more, got True"),
    (
        lambda: require_finite(W / 0),
        "the weights must be finite numbers, but there are NaN or Inf among them",
    ),
    (
        lambda: tucker(W, {0: 1}, method="hooi"),
        "the Tucker method must be one of sthosvd, tensorly, got 'hooi'",
    ),
    (lambda: tucker(W, {0: 1}, sweeps=-1), "sweeps must be an integer, 0 or more, got -1"),
    (lambda: tucker(W, {0: 1}, tol=-1e-9), "tol must be a number, 0 or more, got -1e-09"),
    (lambda: tucker(W, {4: 1}), "a mode of this tensor must be in 0..3, got 4"),
    (lambda: tucker(W, {-1: 1}), "a mode of this tensor must be in 0..3, got -1"),
    (lambda: tucker(W, {3: 3}), "rank R4 must be in 1..2, got 3"),
    (
        lambda: truncate(tucker(W, {0: 1, 2: 1}), {1: 1}),
        "mode 1 has no factor to truncate; modes [0, 2] have one",
    ),
    (
        lambda: truncated_svd(W[0, 0], 1, "full"),
        "the SVD method must be one of exact, randomized, official, got 'full'",
    ),
    (lambda: truncated_svd(W, 1), "truncated SVD needs a matrix, got shape (6, 5, 4, 2)"),
    (lambda: truncated_svd(W[0, 0], 3), "rank r must be in 1..2, got 3"),
    (
        lambda: check_ranks("12", (3, 4)),
        "ranks must be 2 integers (R1 in 1..3, R2 in 1..4), got '12'",
    ),
    (lambda: check_ranks((1,), (3, 4)), "2 ranks are needed (R1 in 1..3, R2 in 1..4), got 1: (1,)"),
    (lambda: check_ranks((1, 2.0), (3, 4)), "rank R2 must be an integer in 1..4, got 2.0"),
    (lambda: laser_rank(0, (3, 4)), "rho (share of the rank kept) must be in (0, 1], got 0"),
    (
        lambda: quantise(LowRank(W[0, 0], W[0, 0].mT), "int2"),
        "--quantize must be one of int8, int4, got 'int2'",
    ),
    (
        lambda: quantise(quantise(LowRank(W[0, 0], W[0, 0].mT), "int8"), "int8"),
        "factors of kind 'int8-low-rank' cannot be quantised",
    ),
    (
        lambda: STACKINGS["heads"].check(("q", "k"), PLAIN),
        "stacking all heads needs the roles ('q', 'k', 'v', 'o'), got ('q', 'k')",
    ),
    (lambda: STACKINGS["official-heads"].check(("q", "k", "v", "o"), GROUPED), OFFICIAL),
    (
        lambda: STACKINGS["matrices"].check(("q", "k"), GROUPED),
        "matrices of unequal shapes cannot be stacked whole: {'q': (12, 12), 'k': (6, 12)}",
    ),
    (
        lambda: STACKINGS["head"].check(("gate",), GROUPED),
        "heads of equal width over the model width can be stacked: "
        "'gate' is (20, 12), not 1 heads of 3 over 12",
    ),
    (
        lambda: STACKINGS[rows_stacking(("q", "k"))].check(("k", "q"), PLAIN),
        "rows-q-k stacks the roles ('q', 'k'), got ('k', 'q')",
    ),
    (
        lambda: allocate([[[Curve(torch.tensor([3, 5]), torch.tensor([1.0, 0.0]))]]], 2),
        "the smallest factors that there are (rank 1) store 3 numbers, more than the 2 asked for",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "said"), REFUSALS, ids=[said[:40] for _, said in REFUSALS])
def test_a_refusal_says_what_is_wrong(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert str(caught.value) == said


def test_good_stackings_are_not_refused() -> None:
    for name in ("heads", "official-heads", "matrices"):
        STACKINGS[name].check(("q", "k", "v", "o"), PLAIN)
    STACKINGS["head"].check(("k",), GROUPED)
    STACKINGS[rows_stacking(("in", "gate"))].check(("in", "gate"), GROUPED)


def test_names_of_stacked_rows() -> None:
    assert rows_stacking(("q", "k")) == "rows-q-k"
    assert rows_stacking(("q",)) == "matrix"


@pytest.mark.parametrize(
    ("values", "entry", "enough"),
    [
        # 2 e²/0.5 against 5e-6 of the energy discarded, 1, less 3 e
        ([1.0, 0.5, 0.5], 1.10e-3, True),
        ([1.0, 0.5, 0.5], 1.13e-3, False),
        # a gap of nothing counts as e: e + e²/0.5 against 5e-6 of 1.5
        ([1.0, 1.0, 0.5], 7e-6, True),
        ([1.0, 1.0, 0.5], 8e-6, False),
        # what is below zero is rounding, and discards nothing
        ([1.0, 0.5, -0.2], 9.3e-4, True),
        ([1.0, 0.5, -0.2], 9.5e-4, False),
        # what may be rounding is no energy: 1e-8 against 5e-6 of the second, less 2e-4
        ([1.0, 2.3e-3], 1e-4, True),
        ([1.0, 2.1e-3], 1e-4, False),
        ([1.0], 1.0, True),  # nothing is discarded
    ],
)
def test_when_a_gram_matrix_is_exact_enough(
    values: list[float], entry: float, enough: bool
) -> None:
    assert eigen._is_exact_enough(torch.tensor(values).double(), 1, entry) is enough


def as_tried(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[Any, ...]]:
    """The arguments of every call of a function of `eigen`, from now on."""
    calls: list[tuple[Any, ...]] = []
    called = getattr(eigen, name)

    def watched(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return called(*args, **options)

    monkeypatch.setattr(eigen, name, watched)
    return calls


@pytest.mark.parametrize(
    ("last", "dtypes"),
    [
        # a float32 Gram matrix of largest entry 1 is off by 6e-8, which must be 1e-4 of its least
        (6.5e-4**0.5, [torch.float32]),
        (5.5e-4**0.5, [torch.float32, torch.float64]),
        (1e-9, [torch.float32, torch.float64]),
    ],
)
def test_singular_values_are_read_off_the_cheapest_gram_matrix(
    last: float, dtypes: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = as_tried(monkeypatch, "_smaller_gram")
    monkeypatch.setattr(eigen, "_svd", None)  # never needed for what came in float32
    values = torch.tensor([1.0, 1.0, last])
    got = eigen.all_singular_values(values.diag(), 0)
    torch.testing.assert_close(got, values.double(), rtol=1e-4, atol=1e-7)
    assert [dtype for _, _, dtype in tried] == dtypes


@pytest.mark.parametrize(
    ("values", "dtype", "rank", "dtypes", "svds"),
    [
        ([1.0, 0.5, 0.1], torch.float32, 1, [torch.float32], 0),
        ([1.0, 0.5, 0.1], torch.bfloat16, 1, [torch.float32], 0),
        ([1.0, 0.5, 0.1], torch.float64, 1, [torch.float64], 0),
        # the second is kept and the third is not: in float32 squares both are rounding
        ([1.0, 1e-5, 1e-6], torch.float32, 2, [torch.float32, torch.float64], 0),
        ([1.0, 1e-5, 1e-6], torch.float64, 2, [torch.float64], 0),
        ([1.0, 1e-9, 1e-10], torch.float32, 2, [torch.float32, torch.float64], 0),
        ([1.0, 1e-9, 1e-10], torch.float64, 2, [torch.float64], 1),
        # squares vanish or overflow
        ([1e-24, 1e-25, 1e-26], torch.float32, 1, [torch.float32, torch.float64], 0),
        ([1e-17, 5e-18, 1e-18], torch.float32, 1, [torch.float32, torch.float64], 0),
        ([1e-147, 5e-148, 1e-148], torch.float64, 1, [torch.float64], 1),
        ([1e25, 1e24, 1e23], torch.float32, 1, [torch.float32, torch.float64], 0),
        ([1e-160, 1e-161, 1e-162], torch.float64, 1, [torch.float64], 1),
        ([1e160, 1e159, 1e158], torch.float64, 1, [torch.float64], 1),
        ([0.0, 0.0, 0.0], torch.float32, 1, [torch.float32, torch.float64], 0),
        ([0.0, 0.0, 0.0], torch.float64, 1, [torch.float64], 1),
    ],
)
def test_leading_vectors_come_the_cheapest_way_that_is_exact(
    values: list[float],
    dtype: torch.dtype,
    rank: int,
    dtypes: list[torch.dtype],
    svds: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grams, decomposed = as_tried(monkeypatch, "_by_gram"), as_tried(monkeypatch, "_svd")
    got = eigen.leading_vectors(torch.tensor(values, dtype=torch.float64).diag().to(dtype), 0, rank)
    assert [args[3] for args in grams] == dtypes
    assert len(decomposed) == svds
    if any(values):
        torch.testing.assert_close(got.abs().double(), torch.eye(3).double()[:, :rank])


def test_more_vectors_than_an_svd_has() -> None:
    """Squares of the numbers vanish, and columns beyond the second are any that are orthonormal."""
    w = 1e-160 * torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u_NR = eigen.leading_vectors(w, 0, 4)
    torch.testing.assert_close(u_NR.mT @ u_NR, torch.eye(4).double())
    torch.testing.assert_close(u_NR[:, :2] @ (u_NR[:, :2].mT @ w), w, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("large", "dtype", "solver", "entry"),
    [
        (4, torch.float32, torch.float64, 2**-24 * 9),
        (3, torch.float32, torch.float32, 2**-24 * (9 + 98**0.5)),  # eigh rounds too
        (3, torch.float64, torch.float64, 2**-53 * 9),
    ],
)
def test_what_a_gram_matrix_may_be_off_by(
    large: int,
    dtype: torch.dtype,
    solver: torch.dtype,
    entry: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Squares of 3, 2 and 1; in large matrices the eigendecomposition is a narrow one too."""
    monkeypatch.setattr(eigen, "LARGE", large)
    solved, judged = as_tried(monkeypatch, "eigh"), as_tried(monkeypatch, "_is_exact_enough")
    w = torch.tensor([2.0, 3.0, 1.0], dtype=dtype).diag()
    got = eigen._by_gram(w, 0, 1, dtype, last=False)
    assert got is not None
    torch.testing.assert_close(got.abs().double(), torch.tensor([[0.0], [1.0], [0.0]]).double())
    assert solved[0][0].dtype == solver
    values, rank, off = judged[0]
    torch.testing.assert_close(values, torch.tensor([9.0, 4.0, 1.0]).double())
    assert (values.dtype, rank, off) == (torch.float64, 1, pytest.approx(entry))


def test_the_smaller_side_is_multiplied() -> None:
    shapes = [(5, 4), (4, 4), (4, 5)]
    assert [eigen._is_tall(torch.empty(shape), 0) for shape in shapes] == [True, False, False]
    w = torch.randn(2, 30, 3)
    assert [len(eigen._smaller_gram(w, mode, torch.float32)) for mode in range(3)] == [2, 6, 3]


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (4, 4)])
def test_an_svd_of_any_shape(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u_NS, singular_S = eigen._svd(x)
    assert (u_NS.shape, u_NS.dtype) == ((shape[0], min(shape)), torch.float64)
    torch.testing.assert_close((u_NS * singular_S**2) @ u_NS.mT, x.double() @ x.double().mT)


def test_completing_a_basis_takes_no_more_memory_than_its_columns() -> None:
    """A complete one of a long mode would have 16 million numbers."""
    for columns in (3, 4):
        q_NR = eigen._orthonormal(torch.randn(50, columns), 3)
        assert q_NR.untyped_storage().nbytes() == 50 * columns * 4
    q_NR = eigen._orthonormal(torch.randn(50, 2), 3)
    torch.testing.assert_close(q_NR.mT @ q_NR, torch.eye(3))


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
def test_small_factorisations_take_one_thread_and_give_the_others_back() -> None:
    for size, threads in ((1, 1), (2047, 1), (2048, 2)):
        with eigen._few_threads(size):
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError), eigen._few_threads(3):
        assert 1 / 0
    assert torch.get_num_threads() == 2
    with eigen._few_threads(3):
        with eigen._few_threads(2048), eigen._few_threads(5):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
