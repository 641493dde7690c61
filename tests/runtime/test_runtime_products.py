"""How factors are run: against float64, in every form, and what the cost model says of a model."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

import tensorllm as tl
from tensorllm.calibration import Calibration, fit
from tensorllm.checkpoint.factored import FactoredFolder
from tensorllm.checkpoint.loading import predicted_of
from tensorllm.compressors import ActivationHybrid
from tensorllm.compressors.calibrated.maps import pivoted
from tensorllm.compressors.layer import Site
from tensorllm.compressors.widths import usual_multiple
from tensorllm.errors import UserError
from tensorllm.runtime import cost, module_for, one_query, products
from tensorllm.runtime.cost import choose, choose_all, whole_speedups
from tensorllm.runtime.products import speed_of, vector_times
from tensorllm.runtime.sites import MOVE, OPERATION, PROMPT
from tensorllm.tensors.factors import parameters
from tensorllm.tensors.pivoted import PivotedLowRank, pivoted_outline
from tensorllm.tensors.stacking import Geometry

GEOMETRY = Geometry(D=24, H=4, G=2, K=6, F=40, gated=True)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=noise, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 5), (37, 5), (16, 700), (40, 1300)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_vector_times_a_matrix(dtype: torch.dtype, shape: tuple[int, int], threads: int):
    x_I, w_IO = random(shape[0]).to(dtype), random(*shape, seed=1).to(dtype)
    want = x_I.double() @ w_IO.double()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            got = [vector_times(x_I, w_IO), vector_times(x_I, w_IO.mT.contiguous().mT)]
    finally:
        torch.set_num_threads(before)
    for y_O in got:
        assert y_O.dtype == dtype
        worst = (y_O.double() - want).abs().max() / want.abs().max()
        assert worst < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("rank", [1, 7, 24])
@pytest.mark.parametrize("lead", [(1, 1), (3, 1), (2, 9)])
@pytest.mark.parametrize("roles", [("q",), ("q", "k", "v"), ("in", "gate"), ("o",), ("out",)])
def test_pivoted_sites(roles: tuple[str, ...], lead: tuple[int, ...], rank: int, grad: bool):
    """One token, several, a prompt; ranks low, middle and full; the old and the new storage."""
    stacking = "matrix" if len(roles) == 1 else "-".join(("rows", *roles))
    site = Site((0,), roles, stacking)
    writes = roles[0] in ("o", "out")
    rows = sum(GEOMETRY.inner(role) for role in roles)
    left, right = random(rows, rank), random(rank, GEOMETRY.D, seed=1)
    new = pivoted(right.mT, left.mT, roles) if writes else pivoted(left, right, roles)
    old = PivotedLowRank(new.basis_RO.contiguous(), new.mix_XR.contiguous(), new.rows_R)
    assert new.transposed is not writes
    assert set(old.tensors()) == {"basis", "mix", "rows"}
    w_ID = new.dense().double()
    for factors in (new, old, type(new).from_tensors(new.tensors())):
        kind = module_for(site, factors)
        assert kind is not None
        modules = kind.roles(site, factors, GEOMETRY)
        x = random(*lead, rows if writes else GEOMETRY.D, seed=2)
        want = x @ w_ID if writes else x @ w_ID.mT
        with torch.set_grad_enabled(grad):
            inputs = x.float()
            got = torch.cat([modules[0, role].module(inputs) for role in roles], dim=-1)
        assert (got.double() - want).abs().max() < 1e-5 * want.abs().max()


@torch.inference_mode()
def test_a_token_runs_with_the_weights_that_are_there():
    """What was asked of weights once is asked again of others, of another dtype or thread count."""
    site = Site((0,), ("in",), "matrix")
    factors = pivoted(random(40, 9), random(9, 24, seed=1), ("in",))
    kind = module_for(site, factors)
    assert kind is not None
    module = kind.roles(site, factors, GEOMETRY)[0, "in"].module.float()
    x = random(1, 1, 24, seed=2).float()
    want = x @ factors.dense().float().mT
    torch.testing.assert_close(module(x), want)
    other = copy.deepcopy(module)
    for weight in other.parameters():
        weight.zero_()
    assert not other(x).any()
    torch.testing.assert_close(module(x), want)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.testing.assert_close(module(x), want)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(module.bfloat16()(x.bfloat16()).float(), want, rtol=0.1, atol=0.1)
    (linear,) = (m for n, m in module.float().named_modules() if n.endswith("basis"))
    linear.weight = torch.nn.Parameter(2 * linear.weight)
    torch.testing.assert_close(module(x), 2 * want, rtol=0.1, atol=0.1)
    linear.weight.data = 2 * linear.weight.data  # the same parameter, other numbers
    torch.testing.assert_close(module(x), 4 * want, rtol=0.1, atol=0.1)
    linear.weight.mul_(2)  # where they are, as an optimizer does
    torch.testing.assert_close(module(x), 8 * want, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("role", ["in", "out"])
def test_a_token_in_any_place_of_memory_and_with_gradients_wanted(role: str):
    """Numbers that lie apart; what is kept for decoding hides no gradient and no other dtype."""
    site = Site((0,), (role,), "matrix")
    left, right = random(40, 9), random(9, 24, seed=1)
    factors = pivoted(left, right, (role,)) if role == "in" else pivoted(right.mT, left.mT, (role,))
    kind = module_for(site, factors)
    assert kind is not None
    module = kind.roles(site, factors, GEOMETRY)[0, role].module.float()
    w_ID = factors.dense().double()
    width = w_ID.shape[1 if role == "in" else 0]
    apart = random(width, 3, seed=2).float()[:, 1].view(1, 1, -1)
    assert not apart.is_contiguous()
    want = apart.double() @ (w_ID.mT if role == "in" else w_ID)
    with torch.no_grad():
        torch.testing.assert_close(module(apart).double(), want, rtol=1e-5, atol=1e-4)
    kept = module._site[0]._step
    module(apart).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    x = apart.clone().requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None
    assert module._site[0]._step is kept  # neither looked at nor made anew
    with torch.no_grad():
        torch.testing.assert_close(module(apart).double(), want, rtol=1e-5, atol=1e-4)
        assert module._site[0]._step is kept
        with pytest.raises(RuntimeError):
            module(apart.bfloat16())


def test_ranks_are_even():
    assert [usual_multiple(n) for n in (8, 48, 64, 576, 4096)] == [1, 2, 4, 32, 256]
    settings = ActivationHybrid(target_ratio=2.0, rank_multiple=16)
    assert settings._ranks(40) == [1, 16, 32]  # all 40 are the matrix as it is
    with pytest.raises(UserError, match="rank_multiple must be 1 or more, got 0"):
        ActivationHybrid(target_ratio=2.0, rank_multiple=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("llama")
    rows = torch.randint(3, 101, (12, 16), generator=torch.Generator().manual_seed(0)).tolist()
    text = Calibration(tuple(map(tuple, rows)), source="random", seed=0)
    tl.compress(model, fit(ActivationHybrid(target_ratio=2.0), model, text))
    out = tmp_path_factory.mktemp("even") / "out"
    tl.save(model, out)
    return out


@pytest.mark.parametrize("speed", [1.0, 6.0])
@torch.inference_mode()
def test_one_query_in_16_bits(speed: float, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The mask that hides nothing changes nothing, beside the dense model's own attention.

    It is given only where products of 16 bits are emulated; else it takes longer.
    """
    monkeypatch.setattr(one_query, "speed_of", lambda dtype: speed)
    one_query._all.cache_clear()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    dense = tl.load(folder, dtype=torch.bfloat16)
    ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(1))

    def decoded(of: Any) -> torch.Tensor:
        cache = of(ids[:, :8], use_cache=True).past_key_values
        return torch.cat(
            [of(ids[:, n : n + 1], past_key_values=cache).logits for n in range(8, 12)], dim=1
        ).float()

    got, want = decoded(model), decoded(dense)
    assert bool(one_query._all.cache_info().misses) == (speed == 1)
    assert (got - want).abs().max() < 5e-2 * want.abs().max()
    for module in model.modules():
        module._forward_pre_hooks.clear()
    again = decoded(model)
    assert (got - again).abs().max() < 2e-2 * want.abs().max()


def test_a_whole_model_is_predicted(folder: Path):
    """Dense everywhere is 1; a tiny model, all overhead, gains less than its matrices shrink."""
    model = tl.load(folder, policy="always")
    found = predicted_of(model, folder)
    assert found is not None
    assert 0 < found[1] < 2
    dense = predicted_of(tl.load(folder), folder)
    assert dense == (1.0, 1.0)


def test_attention_of_16_bits_gains_only_where_products_are_emulated(folder: Path):
    """What one query per group saves is emulated products; float32 has none, so gains nothing."""
    spec = FactoredFolder(folder).roles.spec
    slow, fast, none = (
        whole_speedups(spec, [], 0, dtype, speed)[1] - 1
        for dtype, speed in ((torch.bfloat16, 1.0), (torch.bfloat16, 5.0), (torch.float32, 1.0))
    )
    assert slow > 0
    assert fast == none == 0


def test_what_stays_dense_is_read_faster_where_16_bits_have_instructions(folder: Path):
    """The dense layers of a factored model run by `runtime.one_token`, also the output head."""
    spec, head = FactoredFolder(folder).roles.spec, 10**9  # beside which nothing else matters
    model = tl.load(folder, policy="always")
    choices = model.tensorllm_choices
    slow, fast = (
        whole_speedups(spec, choices, head, torch.bfloat16, speed)[1] for speed in (1.0, 5.0)
    )
    assert slow == pytest.approx(1, rel=0.01)
    assert fast == pytest.approx(1 / 0.65, rel=0.01)
    half = whole_speedups(spec, choices, head, torch.float16, 5.0)[1]
    assert half == pytest.approx(1, rel=0.01)  # as by plain transformers
    dense = [replace(choice, factored=False) for choice in choices]
    assert whole_speedups(spec, dense, head, torch.bfloat16, 5.0)[1] == 1


def test_copies_weigh_more_where_products_are_fast() -> None:
    """A prompt's speed-up shrinks where the machine's products are fast; decoding's stays."""
    shape, rank = (GEOMETRY.H * GEOMETRY.K, GEOMETRY.D), 6
    site = Site((0,), ("q",), "matrix")
    factors = pivoted_outline(*shape, rank, True)
    slow, fast, native = (
        choose(site, factors, GEOMETRY, "always", speed) for speed in (1.0, 2.0, 4.0)
    )
    assert fast.speedups[0] < slow.speedups[0]
    assert native.speedups[1] == fast.speedups[1] == slow.speedups[1]
    products = parameters(factors) - rank
    dense, (_, operations, _, moved, instead) = slow.dense, slow.factors
    assert moved == 2 * shape[0]
    started = OPERATION * operations // PROMPT
    for choice, speed, copied in ((fast, 2.0, MOVE * moved * 2.0), (native, 4.0, instead)):
        small = products + rank + int(speed * started + copied)
        wanted = (dense.products + int(speed * (OPERATION * dense.operations // PROMPT))) / small
        assert choice.speedups[0] == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("role", "rows", "rank", "measured"),
    [
        ("q", 576, 96, 0.82),  # of the time of the dense matrix, 512 tokens in bfloat16 with AMX
        ("q", 576, 160, 1.08),
        ("q", 576, 256, 1.49),
        ("o", 576, 96, 0.74),
        ("o", 576, 160, 0.91),
        ("o", 576, 224, 1.18),
        ("in", 1536, 288, 1.18),
    ],
)
def test_predicted_prompts_where_16_bits_have_instructions(
    role: str, rows: int, rank: int, measured: float
) -> None:
    """The shapes of SmolLM2; the times are of one core of a Xeon, by hand."""
    smollm2 = Geometry(D=576, H=9, G=9, K=64, F=1536, gated=True)
    site = Site((0,), (role,), "matrix")
    factors = pivoted_outline(rows, 576, rank, True)
    choice = choose(site, factors, smollm2, "auto", 6.0)
    assert 1 / choice.speedups[0] == pytest.approx(measured, rel=0.15)
    assert choice.factored == (measured < 1)


@pytest.mark.parametrize(
    ("policy", "dtype", "on_cpu", "wanted"),
    [
        ("auto", torch.bfloat16, True, [True, True, False]),
        ("auto", torch.float32, True, [True, True, True]),
        ("auto", torch.bfloat16, False, [True, True, True]),
        ("always", torch.bfloat16, True, [True, True, True]),
    ],
)
def test_shapes_whose_programs_take_more_than_they_save_stay_dense(
    policy: cost.Policy,
    dtype: torch.dtype,
    on_cpu: bool,
    wanted: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A matrix of order 1,024 and rank 256 saves 589,824 numbers: 1.125 MiB in 16 bits.

    Two of them save more than two programs of 0.75 MiB take; one, of another rank, saves less.
    """
    monkeypatch.setattr(cost, "speed_of", lambda dtype: 1.0)
    big = replace(GEOMETRY, D=1024, H=16, G=16, K=64)
    ranks = (256, 256, 255)
    sites = [
        (Site((layer,), ("q",), "matrix"), pivoted_outline(1024, 1024, rank, True))
        for layer, rank in enumerate(ranks)
    ]
    choices = choose_all(sites, lambda layer: big, policy, dtype, on_cpu=on_cpu)
    assert [choice.factored for choice in choices] == wanted
    assert [choice.site for choice in choices] == [site.name for site, _ in sites]
    if not all(wanted):
        assert "programs" in choices[-1].why


@pytest.mark.parametrize(("narrow_s", "want"), [(1.0, 6.0), (18.0, 1.0)])
def test_the_speed_of_products_is_at_least_that_of_32_bits(
    narrow_s: float, want: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {torch.float32: 6.0, torch.bfloat16: narrow_s}
    monkeypatch.setattr(products, "seconds_of_product", seconds.__getitem__)
    assert speed_of(torch.bfloat16) == want
    assert speed_of(torch.float32) == speed_of(None) == 1.0
