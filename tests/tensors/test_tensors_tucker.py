"""Tucker decomposition against tensorly in float64, planted tensors and properties.

Shapes: D model width, K head width, M matrices, H heads.
"""

import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
import tensorly
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tensorly.decomposition import partial_tucker
from torch import Tensor

from tensorllm.errors import UserError
from tensorllm.tensors import tucker as tucker_module
from tensorllm.tensors import unfold as unfold_module
from tensorllm.tensors.factors import LowRank, Tucker, cast
from tensorllm.tensors.tucker import relative_error, spectra, truncate, tucker
from tensorllm.tensors.unfold import in_memory_order

F64 = torch.float64
LAYOUTS = {"as written": (0, 1, 2, 3), "stacked heads": (2, 3, 1, 0), "mixed": (1, 0, 3, 2)}
DECAYS = {"flat": 0.0, "decaying": 0.6, "steep": 2.0}


def random_tensor(sizes: Sequence[int], decay: float = 0.0, seed: int = 0) -> Tensor:
    """Normal numbers, float64, whose modes' spectra fall like i**-decay, in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(*sizes, generator=generator, dtype=F64)
    for mode, size in enumerate(sizes[:3]):
        scale = torch.arange(1, size + 1, dtype=F64) ** -decay
        basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=F64)).Q
        w = torch.tensordot(basis * scale, w.movedim(mode, 0), dims=1).movedim(0, mode)
    return w.contiguous()


def laid_out(w: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same numbers with the modes in memory in this order."""
    return w.permute(order).contiguous().permute(sorted(range(w.ndim), key=order.__getitem__))


def naive_dense(t: Tucker) -> Tensor:
    w = t.core.double()
    for mode, u in t.factors.items():
        w = torch.tensordot(u.double(), w.movedim(mode, 0), dims=1).movedim(0, mode)
    return w


def naive_error(w: Tensor, t: Tucker) -> float:
    return float((w.double() - naive_dense(t)).norm() / w.double().norm())


def reference_error(w: Tensor, ranks: Mapping[int, int]) -> float:
    """What tensorly reaches in float64."""
    modes = sorted(ranks)
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        (core, factors), _ = partial_tucker(
            w.double(), [ranks[n] for n in modes], modes, n_iter_max=100, init="svd", tol=1e-5
        )
    return naive_error(w, Tucker(core, dict(zip(modes, factors, strict=True))))


def max_skew(u_NR: Tensor) -> float:
    """How far the columns are from orthonormal."""
    return float((u_NR.mT @ u_NR - torch.eye(u_NR.shape[1], dtype=u_NR.dtype)).abs().max())


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16, torch.float16])
def test_as_good_as_tensorly(decay: str, layout: str, dtype: torch.dtype) -> None:
    ranks = {0: 20, 1: 7, 2: 2}
    w = laid_out(random_tensor((64, 24, 4, 6), DECAYS[decay]).to(dtype), LAYOUTS[layout])
    best = reference_error(w, ranks)
    # On flat spectra of so small a tensor there is little to tell the components apart.
    worst = {"flat": 1.004, "decaying": 1.0005, "steep": 1.0002}[decay]
    t = tucker(w, ranks)
    assert naive_error(w, t) <= best * worst
    assert naive_error(w, tucker(w, ranks, sweeps=50, tol=1e-7)) <= best * (1 + (worst - 1) / 3)
    assert t.core.dtype == (F64 if dtype == F64 else torch.float32)
    assert all(max_skew(u) < 2e-6 for u in t.factors.values())


@pytest.mark.parametrize(
    ("sizes", "ranks"),
    [
        ((64, 24, 4, 6), {0: 20, 1: 7}),
        ((64, 24, 4, 6), {1: 7}),
        ((64, 24, 4, 6), {0: 64, 1: 24, 2: 4}),
        ((64, 24, 4, 6), {0: 64, 1: 5, 2: 4}),
        ((64, 24, 4, 6), {0: 1, 1: 1, 2: 1}),
        ((40, 8, 6, 2), {0: 10, 1: 5, 2: 6}),  # grouped heads: 2g + 2 slices
        ((40, 8, 10), {0: 10, 1: 5}),  # one matrix
        ((30, 50, 3), {0: 10, 1: 20, 2: 2}),  # whole matrices
        ((30, 50, 1, 1), {0: 10, 1: 10, 2: 1}),
        ((1, 1, 1, 5), {0: 1, 1: 1, 2: 1}),
        ((12, 30), {0: 5, 1: 5}),
    ],
)
def test_shapes_and_ranks(sizes: tuple[int, ...], ranks: dict[int, int]) -> None:
    w = random_tensor(sizes, 0.8)
    t = tucker(w, ranks, sweeps=3)
    assert t.dense().shape == w.shape
    assert {mode: u.shape for mode, u in t.factors.items()} == {
        mode: (sizes[mode], rank) for mode, rank in ranks.items()
    }
    torch.testing.assert_close(t.dense(), naive_dense(t))
    assert naive_error(w, t) <= reference_error(w, ranks) * 1.001 + 1e-14


def test_ranks_beyond_what_the_other_modes_hold() -> None:
    """A mode of 64 beside modes cut to 2 and 2 has 4 directions; other columns complete them."""
    w = random_tensor((64, 8, 4, 1))
    t = tucker(w, {0: 10, 1: 2, 2: 2}, sweeps=0)
    assert t.factors[0].shape == (64, 10)
    assert max_skew(t.factors[0]) < 1e-12
    enough = tucker(w, {0: 4, 1: 2, 2: 2}, sweeps=0)
    assert naive_error(w, t) == pytest.approx(naive_error(w, enough))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_planted_low_rank_is_recovered(dtype: torch.dtype, layout: str) -> None:
    planted = Tucker(
        random_tensor((5, 3, 2, 6)),
        {
            n: torch.linalg.qr(random_tensor((size, rank))).Q
            for n, size, rank in ((0, 64, 5), (1, 24, 3), (2, 4, 2))
        },
    )
    w = laid_out(naive_dense(planted).to(dtype), LAYOUTS[layout])
    unit = 1e-6 if dtype == torch.float32 else 1e-13
    for sweeps in (0, 2):
        assert naive_error(w, tucker(w, {0: 5, 1: 3, 2: 2}, sweeps=sweeps)) < unit
    one_less = naive_error(w, tucker(w, {0: 4, 1: 3, 2: 2}))
    assert one_less == pytest.approx(reference_error(w, {0: 4, 1: 3, 2: 2}), rel=1e-3)


@pytest.mark.parametrize("decades", [2, 4, 6, 10])
def test_ill_conditioned(decades: int) -> None:
    """Wanted singular values far below the largest: float32 Gram matrices would lose them."""
    w = random_tensor((4, 24, 64))
    scale = torch.logspace(0, -decades, 64, dtype=F64)
    basis = torch.linalg.qr(random_tensor((64, 64), seed=1)).Q
    w = w * scale @ basis
    for rank in (10, 32, 60):
        exact = torch.linalg.svdvals(w.flatten(0, 1).double())
        best = float(exact[rank:].norm() / exact.norm())
        assert naive_error(w, tucker(w, {2: rank})) <= best * (1 + 1e-6) + 1e-14
        w32 = w.float()
        exact = torch.linalg.svdvals(w32.flatten(0, 1).double())
        best = float(exact[rank:].norm() / exact.norm())
        assert naive_error(w32, tucker(w32, {2: rank})) <= best * (1 + 1e-6) + 3e-7


@pytest.mark.parametrize("sweeps", [0, 1, 3])
def test_core_is_all_orthogonal_and_ordered(sweeps: int) -> None:
    t = tucker(random_tensor((40, 16, 4, 3), 0.5), {0: 12, 1: 6, 2: 3}, sweeps=sweeps)
    for mode in range(3):
        rows = t.core.movedim(mode, 0).flatten(1)
        gram = rows @ rows.mT
        norms = gram.diagonal()
        assert bool((norms.diff() <= 1e-12 * norms[0]).all())
        assert float((gram - norms.diag()).abs().max()) < 1e-10 * float(norms[0])


sizes_of_tensors = st.tuples(*(st.integers(1, most) for most in (12, 8, 4, 3)))


@settings(max_examples=40, deadline=None)
@given(sizes_of_tensors, st.data())
def test_smaller_ranks_are_slices(sizes: tuple[int, ...], data: st.DataObject) -> None:
    """Their error falls with every rank, and stays within sqrt(3) of the best there is."""
    w = random_tensor(sizes, 0.5)
    large = {n: data.draw(st.integers(1, sizes[n])) for n in range(3)}
    small = {n: data.draw(st.integers(1, large[n])) for n in range(3)}
    whole = tucker(w, large, sweeps=0)
    cut = truncate(whole, small)
    error = naive_error(w, cut)
    assert cut.core.untyped_storage().data_ptr() == whole.core.untyped_storage().data_ptr()
    assert naive_error(w, whole) <= error + 1e-9
    for mode in range(3):
        if small[mode] < large[mode]:
            more = truncate(whole, {**small, mode: small[mode] + 1})
            assert naive_error(w, more) <= error + 1e-9
    refined = naive_error(w, truncate(whole, small, refine=True))
    assert refined <= error + 1e-9
    best = naive_error(w, tucker(w, small, sweeps=50, tol=1e-9))
    assert error <= math.sqrt(3) * best + 1e-7


@settings(max_examples=30, deadline=None)
@given(sizes_of_tensors, st.data())
def test_error_falls_with_every_rank(sizes: tuple[int, ...], data: st.DataObject) -> None:
    w = random_tensor(sizes, 0.5)
    ranks = {n: data.draw(st.integers(1, sizes[n])) for n in range(3)}
    mode = data.draw(st.sampled_from(range(3)))
    more = {**ranks, mode: min(sizes[mode], ranks[mode] + 1)}
    error = naive_error(w, tucker(w, ranks, sweeps=30, tol=1e-9))
    assert naive_error(w, tucker(w, more, sweeps=30, tol=1e-9)) <= 1.02 * error + 1e-7


@settings(max_examples=30, deadline=None)
@example(-24.0, [4, 3, 2, 1, 0], torch.float32)  # where float32 squares vanish
@example(24.0, [4, 3, 2, 1, 0], torch.float32)  # and where they overflow
@given(st.floats(-25, 25), st.permutations(range(5)), st.sampled_from([torch.float32, F64]))
def test_scale_and_order_of_heads(power: float, order: list[int], dtype: torch.dtype) -> None:
    """Scaling the weights scales, permuting the heads permutes what comes out."""
    w = random_tensor((20, 8, 4, 5), 0.5).to(dtype)
    moved = (w * 10**power)[..., order]
    before, after = (tucker(x, {0: 6, 1: 3, 2: 2}) for x in (w, moved))
    want, got = before.dense().double()[..., order] * 10**power, after.dense().double()
    assert float((got - want).norm() / want.norm()) < (2e-4 if dtype == torch.float32 else 1e-9)
    error = relative_error(w, before)
    assert relative_error(moved, after) == pytest.approx(error, rel=1e-5)


def naive_tucker(w: Tensor, ranks: Mapping[int, int], sweeps: int) -> Tensor:
    """The dense tensor after HOOI, each mode by an SVD: the smallest mode begins, and ends sweeps.

    In the initial truncation a mode sees those before it cut, in a sweep all others.
    """
    modes = sorted(ranks, key=lambda n: w.shape[n])
    onto: dict[int, Tensor] = {}

    def projected(others: Iterable[int]) -> Tensor:
        x = w
        for n in others:
            x = torch.tensordot(onto[n], x.movedim(n, 0), dims=1).movedim(0, n)
        return x

    for step, mode in enumerate(modes + sweeps * [*modes[1:], modes[0]]):
        x = projected(n for n in (modes[:step] if step < len(modes) else modes) if n != mode)
        u = torch.linalg.svd(x.movedim(mode, 0).flatten(1)).U[:, : ranks[mode]]
        onto[mode] = u @ u.mT
    return projected(modes)


@pytest.mark.parametrize("ranks", [{0: 4, 1: 2, 2: 3}, {0: 12, 1: 2, 2: 3}, {1: 2, 2: 8}])
def test_sweeps_are_those_of_hooi(ranks: dict[int, int]) -> None:
    w = random_tensor((12, 5, 8, 2))
    for sweeps in range(4):
        got = tucker(w, ranks, sweeps=sweeps, tol=0).dense()
        torch.testing.assert_close(got, naive_tucker(w, ranks, sweeps))


@pytest.mark.parametrize(("sweeps", "large", "turns"), [(0, 1, 2), (1, 2, 2), (3, 6, 2)])
def test_no_costly_product_is_made_twice(
    sweeps: int, large: int, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of the whole tensor a sweep, of which the first has one already; no rotation in vain."""
    w = random_tensor((12, 5, 8, 2))
    calls: list[object] = []

    def watched(module: Any, name: str) -> Callable[..., Any]:
        called = getattr(module, name)
        return lambda x, *rest: calls.append((name, x.numel())) or called(x, *rest)

    for module, name in (
        (tucker_module, "project"),
        (tucker_module, "eigh"),
        (unfold_module, "project"),
    ):
        monkeypatch.setattr(module, name, watched(module, name))
    tucker(w, {0: 4, 1: 2, 2: 3}, sweeps=sweeps, tol=0)
    assert calls.count(("project", w.numel())) == large
    assert sum(name == "eigh" for name, _ in calls) == turns
    projections = sum(name == "project" for name, _ in calls)
    # three modes cut, two turned; a sweep: a mode less for each of two, two for the last, the core
    assert projections == 3 + 2 + sweeps * 6 - bool(sweeps)


def test_one_mode_that_is_cut_takes_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to sweep, and modes of full rank are only rotated."""
    w = random_tensor((12, 5, 8, 2))
    sizes: list[int] = []
    leading_vectors = tucker_module.leading_vectors

    def watched(x: Tensor, mode: int, rank: int) -> Tensor:
        sizes.append(x.numel())
        return leading_vectors(x, mode, rank)

    monkeypatch.setattr(tucker_module, "leading_vectors", watched)
    tucker(w, {0: 12, 1: 2, 2: 8}, sweeps=3)
    assert sizes == [w.numel()]


def test_what_an_orthogonal_projection_leaves() -> None:
    core = torch.tensor([1.0, 2.0])
    assert tucker_module._error_of(20.0, core) == pytest.approx(0.75**0.5)
    assert tucker_module._error_of(5 * (1 - 1e-6), core) == 0  # rounding
    assert tucker_module._error_of(0.0, 0 * core) == 0


def test_sweeps_lower_the_error_and_stop() -> None:
    w = random_tensor((40, 16, 4, 6), 0.4)
    ranks = {0: 10, 1: 5, 2: 2}
    errors = [naive_error(w, tucker(w, ranks, sweeps=n, tol=0)) for n in range(8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[7]
    gains = [before - after for before, after in itertools.pairwise(errors)]
    for n in range(1, 6):  # the n-th sweep after the first gains too little, and is the last
        tol = (gains[n - 1] + gains[n]) / 2
        assert naive_error(w, tucker(w, ranks, sweeps=1000, tol=tol)) == errors[n + 1]
    enough = next(n for n, gain in enumerate(gains) if gain < 2e-5)
    assert naive_error(w, tucker(w, ranks)) == errors[enough + 1]


def test_relative_error_and_spectra() -> None:
    for dtype in (torch.float32, F64, torch.bfloat16):
        w = random_tensor((30, 12, 4, 3), 0.5).to(dtype)
        for ranks in ({0: 8, 1: 3, 2: 2}, {0: 30, 1: 12, 2: 4}):
            t = tucker(w, ranks)
            assert relative_error(w, t) == pytest.approx(naive_error(w, t), rel=1e-4, abs=3e-7)
        for mode, got in spectra(w, range(4)).items():
            want = torch.linalg.svdvals(w.double().movedim(mode, 0).flatten(1))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    w = random_tensor((30, 12, 4, 3), 0.5).float()
    rounded = cast(tucker(w, {0: 8, 1: 3, 2: 2}), torch.bfloat16)
    other = Tucker(torch.randn(8, 3, 4, 3), {0: torch.randn(30, 8), 1: torch.randn(12, 3)})
    for t in (rounded, other):
        assert isinstance(t, Tucker)
        assert relative_error(w, t) == pytest.approx(naive_error(w, t), rel=1e-4)
    zero = torch.zeros(3, 4)
    assert relative_error(zero, LowRank(torch.zeros(3, 1), torch.zeros(1, 4))) == 0
    assert relative_error(zero, LowRank(torch.full((3, 1), 0.1), torch.full((1, 4), 0.1))) == 1


def test_relative_errors_of_other_kinds() -> None:
    w = random_tensor((9, 7))
    u, v = random_tensor((9, 2), seed=1), random_tensor((2, 7), seed=2)
    assert relative_error(w, LowRank(u, v)) == pytest.approx(float((w - u @ v).norm() / w.norm()))


def test_a_large_error_is_told_without_the_dense_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    w = random_tensor((30, 12, 4, 3))
    t = tucker(w, {0: 8, 1: 3, 2: 2})
    monkeypatch.setattr(Tucker, "dense", None)
    assert relative_error(w, t) == pytest.approx(naive_error(w, t))


def test_dense_lies_as_matrices_are_taken_out_of_it() -> None:
    """Model width last in memory, so that unstacking copies rows and not single numbers."""
    t = tucker(random_tensor((20, 8, 4, 5)), {0: 6, 1: 3, 2: 2})
    assert in_memory_order(t.dense())[1] == [3, 2, 1, 0]


def test_zeros() -> None:
    t = tucker(torch.zeros(6, 5, 4, 2), {0: 3, 1: 2, 2: 1})
    assert torch.equal(t.dense(), torch.zeros(6, 5, 4, 2))
    assert all(max_skew(u) < 1e-6 for u in t.factors.values())


def test_tensorly_is_an_option() -> None:
    w = random_tensor((30, 12, 4, 3), 0.5)
    ranks = {0: 8, 1: 3, 2: 2}
    got = naive_error(w, tucker(w, ranks, method="tensorly"))
    assert got == pytest.approx(reference_error(w, ranks), rel=1e-9)


@pytest.mark.parametrize(("sweeps", "limit"), [(0, 1), (1, 1), (3, 3), (None, 100)])
def test_tensorly_ends_where_it_is_told(sweeps: int | None, limit: int) -> None:
    w, ranks = random_tensor((20, 12, 4, 3)), {0: 5, 1: 3, 2: 2}
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        (core, factors), _ = partial_tucker(
            w, list(ranks.values()), list(ranks), n_iter_max=limit, init="svd", tol=0
        )
    got = tucker(w, ranks, method="tensorly", sweeps=sweeps, tol=0)
    want = Tucker(core, dict(enumerate(factors)))
    torch.testing.assert_close(got.dense(), naive_dense(want))


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_errors_of_slices(dtype: torch.dtype) -> None:
    """Of every (matrix, head), whether the mode of the matrices has a factor or not."""
    w = random_tensor((12, 8, 4, 3), 0.5).to(dtype)
    for ranks in ({0: 5, 1: 3, 2: 2}, {0: 5, 1: 3}, {2: 2}, {0: 2}):
        t = tucker(w, ranks)
        found = t.slice_errors(w, (0, 1))
        assert found is not None
        lost = w.double() - naive_dense(t)
        for got, want in zip(found, (lost, w.double()), strict=True):
            assert got.dtype == F64
            torch.testing.assert_close(got, want.norm(dim=(0, 1)), rtol=1e-5, atol=1e-6)


def test_errors_of_slices_that_would_cancel() -> None:
    """Near 0.1 of a slice's norm, which is 0.01 of its energy; its size does not matter."""
    w = torch.ones(2, 2, 2, dtype=F64) * torch.tensor([1.0, 100.0], dtype=F64)

    def short_of(shares: list[float]) -> tuple[Tensor, Tensor] | None:
        scale = 1 - torch.tensor(shares, dtype=F64)
        return Tucker(w * scale, {}).slice_errors(w, (0, 1))

    assert short_of([0.5, 0.09]) is None
    assert short_of([0.09, 0.5]) is None
    found = short_of([0.11, 0.5])
    assert found is not None
    torch.testing.assert_close(found[0], torch.tensor([0.22, 100.0], dtype=F64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
@pytest.mark.parametrize("ranks", [{0: 4, 1: 2, 2: 2}, {0: 6, 1: 5, 2: 4}])
def test_not_finite(bad: float, dtype: torch.dtype, ranks: dict[int, int]) -> None:
    w = torch.ones(6, 5, 4, 2, dtype=dtype)
    w[3, 2, 1, 0] = bad
    for method in ("sthosvd", "tensorly"):
        with pytest.raises(UserError, match="finite"):
            tucker(w, ranks, method=method)
    with pytest.raises(UserError, match="finite"):
        spectra(w, (0,))
    with pytest.raises(UserError, match="finite"):
        relative_error(w, tucker(torch.ones(6, 5, 4, 2), ranks))


@pytest.mark.parametrize(
    ("ranks", "options", "said"),
    [
        ({0: 7, 1: 1, 2: 1}, {}, "R1 must be in 1..6, got 7"),
        ({0: 1, 1: 0, 2: 1}, {}, "R2 must be in 1..5, got 0"),
        ({2: 1.5}, {}, "R3 must be an integer"),
        ({4: 1}, {}, "0..3, got 4"),
        ({0: 1}, {"sweeps": -1}, "sweeps"),
        ({0: 1}, {"sweeps": 1.5}, "sweeps"),
        ({0: 1}, {"tol": float("nan")}, "tol"),
        ({0: 1}, {"method": "hosvd"}, "sthosvd, tensorly"),
    ],
)
def test_bad_arguments(ranks: dict[int, int], options: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        tucker(torch.ones(6, 5, 4, 2), ranks, **options)  # type: ignore[arg-type]


def test_modes_that_are_not_named_keep_their_ranks() -> None:
    t = tucker(random_tensor((6, 5, 4, 2)), {0: 4, 1: 3})
    for refine in (False, True):
        assert truncate(t, {0: 2}, refine=refine).ranks == (2, 3)
    cut = Tucker(t.core[:2], {0: t.factors[0][:, :2], 1: t.factors[1]})
    torch.testing.assert_close(truncate(t, {0: 2}).dense(), naive_dense(cut))


def test_truncate_only_downwards() -> None:
    t = tucker(random_tensor((6, 5, 4, 2)), {0: 4, 1: 2})
    with pytest.raises(UserError, match=r"R1 must be in 1..4, got 5"):
        truncate(t, {0: 5})
    with pytest.raises(UserError, match=r"mode 2 has no factor"):
        truncate(t, {2: 1})


@pytest.mark.parametrize("gaps", ["sliced", "expanded"])
def test_gaps_in_memory(gaps: str) -> None:
    w = random_tensor((12, 10, 4, 6))
    w = w[:, ::2, :, 1:] if gaps == "sliced" else w[:, :, :1].expand(12, 10, 4, 6)
    ranks = {0: 5, 1: 3, 2: 1}
    want = naive_error(w, tucker(w.clone(memory_format=torch.contiguous_format), ranks))
    assert naive_error(w, tucker(w, ranks)) == pytest.approx(want)


MEMORY = """
import resource, torch
from tensorllm.tensors.tucker import relative_error, tucker
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
w = torch.empty(4, 16, 256, 4096, dtype=torch.bfloat16)
for part in w:  # so that making the tensor is not what takes the memory
    part.normal_(generator=generator)
t = tucker(w.permute(3, 2, 0, 1), {0: 304, 1: 19, 2: 2})
print(relative_error(w.permute(3, 2, 0, 1), t))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_peak_memory_of_a_gptj_layer() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True
    )
    error, peak_gib = map(float, done.stdout.split())
    assert error == pytest.approx(0.98667, abs=1e-4)
    assert peak_gib < 2, f"peak resident memory {peak_gib:.2f} GiB"


def test_sweeps_go_on_where_one_is_not_enough() -> None:
    """A tensor whose width alone decays: one sweep leaves 1.0006 times the error of many."""
    generator = torch.Generator().manual_seed(0)
    width = 1024
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    scaled = basis * torch.arange(1, width + 1).pow(-0.5)
    w = (scaled @ torch.randn(width, 64 * 4 * 16, generator=generator)).view(width, 64, 4, 16)
    ranks = {0: 76, 1: 5, 2: 2}
    want, one, default = (
        relative_error(w, tucker(w, ranks, **given))
        for given in ({"sweeps": 100, "tol": 1e-5}, {"sweeps": 1}, {})
    )
    assert one > 1.0005 * want  # else the tensor shows nothing
    assert default < 1.0002 * want
