"""Every kind of factors: rebuilt against einsum, stored and read again, counted, cast."""

import itertools
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import tensorly
import torch
from safetensors.torch import load, save
from tensorly import decomposition
from tensorly.decomposition import parafac
from torch import Tensor

from tensorllm.errors import UserError
from tensorllm.tensors import factors as factors_module
from tensorllm.tensors import tucker as tucker_module
from tensorllm.tensors import unfold
from tensorllm.tensors.blocks import BlockLowRank
from tensorllm.tensors.cp import cp
from tensorllm.tensors.factors import CP, FACTORS, Factors, LowRank, Tucker, cast, parameters
from tensorllm.tensors.kept_rows import KeptRows
from tensorllm.tensors.pivoted import PivotedLowRank, pivot
from tensorllm.tensors.quantised import BITS, kind_named, quantise
from tensorllm.tensors.tucker import tucker
from tensorllm.tensors.unfold import project
from tensorllm.tensors.whole import Whole


def random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def examples() -> dict[str, tuple[Factors, Tensor]]:
    """Kind -> factors and the tensor that they stand for, by einsum."""
    core, a, b, c = random(5, 3, 2, 4), random(12, 5), random(7, 3), random(4, 2)
    u, v = random(9, 3), random(3, 6)
    weights, x, y, z = random(4), random(6, 4), random(5, 4), random(3, 4)
    floats: dict[str, tuple[Factors, Tensor]] = {
        "tucker": (
            Tucker(core, {2: c, 0: a, 1: b}),
            torch.einsum("prsh,dp,kr,ms->dkmh", core, a, b, c),
        ),
        "low-rank": (LowRank(u, v), torch.einsum("ir,ro->io", u, v)),
        "pivoted-low-rank": (pivot(u, v), torch.einsum("ir,ro->io", u, v)),
        "cp": (CP(weights, (x, y, z)), torch.einsum("r,ir,jr,kr->ijk", weights, x, y, z)),
    }
    u_BJR, v_BRO = random(3, 5, 2), random(3, 2, 6)
    blocks = torch.einsum("bjr,bro->bjo", u_BJR, v_BRO).reshape(15, 6)
    floats["block-low-rank"] = (BlockLowRank(u_BJR, v_BRO), blocks)
    floats["whole"] = (Whole(u @ v), u @ v)
    kept = torch.zeros(9, 6)
    kept[[1, 4, 7]] = v
    floats["kept-rows"] = (KeptRows.of(torch.tensor([4, 1, 7]), v[[1, 0, 2]], 9), kept)
    # Small tensors stay as they are; tests/runtime/test_runtime_quantised.py has large ones.
    narrow = {
        f"{how}-{kind}": (quantise(factors, how), want)
        for kind, (factors, want) in floats.items()
        for how in BITS
    }
    return floats | narrow


EXAMPLES = examples()


def test_every_kind_has_an_example() -> None:
    narrow = {f"{how}-{kind}" for how in BITS for kind in FACTORS}
    assert set(EXAMPLES) == set(FACTORS) | narrow
    assert all(EXAMPLES[kind][0].kind == kind for kind in EXAMPLES)
    assert all(type(EXAMPLES[kind][0]) is kind_named(kind) for kind in EXAMPLES)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_dense_is_the_sum_over_all_ranks(kind: str) -> None:
    factors, want = EXAMPLES[kind]
    torch.testing.assert_close(factors.dense(), want, rtol=1e-4, atol=1e-5)
    assert factors.shape == tuple(want.shape)


@pytest.mark.parametrize(
    ("factors", "ranks"),
    [
        (LowRank(random(9, 3), random(4, 6)), "3 and 4"),
        (PivotedLowRank(random(3, 6), random(6, 2), torch.arange(3)), "3 and 3 and 2"),
        (Tucker(random(5, 3), {1: random(7, 2)}), "3 and 2"),
        (CP(random(3), (random(5, 3), random(6, 4))), "3 and 3 and 4"),
        (BlockLowRank(random(2, 5, 3), random(2, 4, 6)), "3 and 4"),
        (quantise(LowRank(random(64, 64), random(65, 64)), "int8"), "64 and 65"),
    ],
)
def test_factors_of_different_ranks_have_no_shape(factors: Factors, ranks: str) -> None:
    with pytest.raises(UserError, match=f"factors of ranks {ranks} do not fit together"):
        _ = factors.shape


@pytest.mark.parametrize("kind", EXAMPLES)
def test_stored_and_read_again(kind: str) -> None:
    factors, _ = EXAMPLES[kind]
    stored = {name: t.contiguous() for name, t in factors.tensors().items()}
    again = kind_named(kind).from_tensors(load(save(stored)))
    assert torch.equal(again.dense(), factors.dense())
    assert again.ranks == factors.ranks
    assert parameters(again) == parameters(factors) == sum(t.numel() for t in stored.values())


@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_cast_stores_narrow_and_rebuilds_wide(kind: str, dtype: torch.dtype) -> None:
    factors, want = EXAMPLES[kind]
    narrow = cast(factors, dtype)
    floats = [t for t in narrow.tensors().values() if t.is_floating_point()]  # row numbers stay
    assert floats
    assert all(t.dtype == dtype for t in floats)
    dense = narrow.dense()
    assert dense.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float((dense - want).norm() / want.norm()) < 0.02


def multiply_adds(sizes: tuple[int, ...], order: Iterable[int], to: dict[int, int]) -> int:
    """Of changing the size of one mode after the other."""
    now, total = list(sizes), 0
    for mode in order:
        total += math.prod(now) * to[mode]
        now[mode] = to[mode]
    return total


@pytest.mark.parametrize("seed", range(4))
def test_products_come_in_the_cheapest_order(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = torch.Generator().manual_seed(seed)
    small = torch.randint(1, 6, (4,), generator=noise).tolist()
    large = [r + int(torch.randint(1, 20, (), generator=noise)) for r in small]
    us = {n: random(large[n], small[n]) for n in range(4)}
    orders: list[int] = []

    def watched(w: Tensor, u: Tensor, mode: int) -> Tensor:
        orders.append(mode)
        return project(w, u, mode)

    for module in (factors_module, tucker_module, unfold):
        monkeypatch.setattr(module, "project", watched)
    for run, sizes, to in (
        (lambda: Tucker(random(*small), us).dense(), small, large),
        (lambda: unfold.project_all(random(*large), us), large, small),
    ):
        orders.clear()
        run()
        cost = partial(multiply_adds, sizes, to=dict(enumerate(to)))
        assert cost(orders) == min(map(cost, itertools.permutations(range(4))))


def test_ranks() -> None:
    assert [EXAMPLES[kind][0].ranks for kind in ("tucker", "low-rank", "cp")] == [
        (5, 3, 2),
        (3,),
        (4,),
    ]


@pytest.mark.parametrize("modes", [2, 3, 4])
def test_cp_of_any_number_of_modes(modes: int) -> None:
    factors = tuple(random(size, 2, seed=size) for size in (6, 5, 4, 3)[:modes])
    letters = "ijkl"[:modes]
    inputs = ",".join(f"{letter}r" for letter in letters)
    want = torch.einsum(f"r,{inputs}->{letters}", torch.tensor([2.0, 3.0]), *factors)
    torch.testing.assert_close(CP(torch.tensor([2.0, 3.0]), factors).dense(), want)


def test_cp_finds_a_planted_sum() -> None:
    planted = CP(torch.ones(2), (random(20, 2), random(15, 2), random(4, 2)))
    for dtype in (torch.float32, torch.float64):
        w = planted.dense().to(dtype)
        found = cp(w, 2, sweeps=500, tol=1e-9)
        assert float((found.dense() - w).norm() / w.norm()) < 1e-2
        assert found.weights_R.dtype == dtype


def test_cp_is_seeded_and_leaves_the_global_state_alone() -> None:
    w, state = random(8, 7, 3), torch.random.get_rng_state()
    first, again, other = (cp(w, 2, seed=seed, sweeps=2).dense() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


ENDS = [{"sweeps": 3, "tol": 0.0}, {"sweeps": 50, "tol": 0.05}, {"tol": 0.0}, {}]


@pytest.mark.parametrize("ends", ENDS)
def test_cp_ends_where_it_is_told(ends: dict[str, float]) -> None:
    """tensorly with the same ends, from the same start, comes to the same."""
    w, given = random(9, 8, 7), {"sweeps": 100, "tol": 1e-6} | ends
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        weights_R, factors = parafac(
            w, 4, n_iter_max=given["sweeps"], init="random", tol=given["tol"], random_state=0
        )
    want = torch.einsum("r,ar,br,cr->abc", weights_R, *factors)
    torch.testing.assert_close(cp(w, 4, **ends).dense(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [0, -1, 1.5, True])
def test_cp_rank_out_of_range(rank: int) -> None:
    with pytest.raises(UserError, match="1 or more"):
        cp(random(4, 3, 2), rank)


def test_cp_of_what_is_not_finite() -> None:
    with pytest.raises(UserError, match="finite"):
        cp(torch.full((4, 3, 2), float("nan")), 1)


@pytest.mark.parametrize("call", ["cp", "tucker"])
def test_tensorly_is_switched_to_pytorch_in_this_thread_alone(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's own tensorly, in another thread, keeps the backend it has."""
    seen: list[str] = []

    def watched(decompose: Callable[..., Any]) -> Callable[..., Any]:
        def decomposed(*args: Any, **options: Any) -> Any:
            seen.append(tensorly.get_backend())
            with ThreadPoolExecutor(1) as other:
                seen.append(other.submit(tensorly.get_backend).result())
            return decompose(*args, **options)

        return decomposed

    for name in ("parafac", "partial_tucker"):
        monkeypatch.setattr(decomposition, name, watched(getattr(decomposition, name)))
    before = tensorly.get_backend()
    w = random(6, 5, 4)
    if call == "cp":
        cp(w, 2, sweeps=2)
    else:
        tucker(w, {0: 2}, method="tensorly")
    assert seen == ["pytorch", before]
    assert tensorly.get_backend() == before
