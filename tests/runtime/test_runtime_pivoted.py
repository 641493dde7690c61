"""Factors of the activation modes run in their factors: pivoted, and shared by q, k, v."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import tensorllm as tl
from tensorllm.calibration import Calibration, fit
from tensorllm.checkpoint import loading
from tensorllm.checkpoint.loading import install_skeleton
from tensorllm.compression.factorize import factorize
from tensorllm.compressors import ActivationHybrid
from tensorllm.runtime import low_rank, ordering
from tensorllm.runtime.cache import GrowingLayer
from tensorllm.runtime.low_rank import FEW, PivotedInputs, PivotedSite
from tensorllm.runtime.sites import RoleLinear

IDS = torch.randint(3, 100, (2, 11), generator=torch.Generator().manual_seed(1))


def fitted(name: str) -> Any:
    """A compressed model, dense in memory."""
    model = tiny_model(name)
    draws = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 101, (12, 16), generator=draws).tolist()
    text = Calibration(tuple(map(tuple, rows)), source="random", seed=0)
    tl.compress(model, fit(ActivationHybrid(target_ratio=2.0), model, text))
    return model


@torch.no_grad()
def same(got: Any, want: Any, tol: float = 1e-5) -> None:
    """Equal but for rounding; four times that of `want` itself where its norms enlarge it."""
    a, b = got(IDS).logits, want(IDS).logits
    own = (copy.deepcopy(want).double()(IDS).logits - b).abs().max() if tol else 0.0
    assert (a - b).abs().max() <= max(tol * b.abs().max(), 4 * own)


@pytest.mark.parametrize("name", TINY)
def test_a_folder_opens_in_its_factors(name: str, tmp_path: Path):
    dense = fitted(name)
    factored = copy.deepcopy(dense)
    factorize(factored)
    same(factored, dense)
    tl.save(dense, tmp_path / "out")
    auto = AutoModelForMaskedLM if TINY[name].task == "masked" else AutoModelForCausalLM
    opened, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    same(opened, dense)
    opened.save_pretrained(tmp_path / "again")
    same(auto.from_pretrained(tmp_path / "again"), opened, tol=0)
    same(tl.load(tmp_path / "again"), dense)


def test_what_is_computed_from_indices_has_no_placeholder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """transformers would make, move and set each: a tenth of the time to open a folder."""
    tl.save(fitted("llama"), tmp_path / "out")
    skeletons: list[Any] = []

    def spied(model: Any, *args: Any, **kwargs: Any) -> Any:
        made = install_skeleton(model, *args, **kwargs)
        skeletons.append([name for name, _ in model.named_non_persistent_buffers()])
        return made

    monkeypatch.setattr(loading, "install_skeleton", spied)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all("rotary" in name for name in skeletons[0])
    for site in sites(opened):
        assert site.made_I.dtype == site.places_I.dtype == torch.int32


def sites(model: Any) -> list[PivotedSite]:
    return [m for m in model.modules() if isinstance(m, PivotedSite)]


@torch.no_grad()
def test_the_latent_is_made_once_for_all_readers(monkeypatch: pytest.MonkeyPatch):
    model = fitted("llama")
    factorize(model)
    assert any(len(site.sizes) > 1 for site in sites(model))
    ids = IDS.repeat(1, 3)
    assert IDS.numel() <= FEW < ids.numel()
    want = model(ids).logits
    made = 0
    outputs, step = PivotedInputs._outputs, PivotedInputs.step

    def counted(site: PivotedInputs, x: Any) -> Any:
        nonlocal made
        made += 1
        return outputs(site, x)

    def counted_step(site: PivotedInputs, x: Any) -> Any:
        nonlocal made
        run = step(site, x)
        made += run is not None
        return run

    monkeypatch.setattr(PivotedInputs, "_outputs", counted)
    assert torch.equal(model(ids).logits, want)
    parts = [m for m in model.modules() if isinstance(m, RoleLinear)]
    inputs = [part for part in parts if isinstance(part._site[0], PivotedInputs)]
    assert made == sum(part.index == 0 for part in inputs) < len(inputs)
    made = 0
    monkeypatch.setattr(PivotedInputs, "step", counted_step)
    model(IDS)
    assert made == sum(part.index == 0 for part in inputs)
    assert all(
        m._held is None for m in model.modules() if isinstance(m, PivotedInputs)
    )  # no activation is kept


def test_it_learns_and_runs_in_bfloat16(tmp_path: Path):
    dense = fitted("gptj")
    tl.save(dense, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").train()
    before = model(IDS, labels=IDS).loss
    before.backward()
    for site in sites(model):
        for p in site.parameters():
            assert not p.numel() or p.grad.abs().sum() > 0
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert model(IDS, labels=IDS).loss < before
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert all(site.rows_R.dtype == torch.int32 for site in sites(half))
    same(half.float(), dense, tol=5e-2)


@torch.no_grad()
def test_it_compiles_without_a_break():
    model = fitted("llama")
    factorize(model)
    for ids in (IDS, IDS[:1, :1]):  # a prompt, and a token by itself
        want = model(ids, use_cache=False).logits
        got = torch.compile(model, fullgraph=True, backend="eager")(ids, use_cache=False).logits
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_token_of_each_of_a_few_texts(dtype: torch.dtype):
    """Columns put in order by the kernel of each dtype: what the dense weights give."""
    dense = fitted("llama")
    factored = copy.deepcopy(dense)
    factorize(factored)
    factored.to(dtype)
    ids = torch.arange(3, 3 + FEW)[:, None]
    got, want = factored(ids).logits.float(), dense(ids).logits
    tol = 1e-5 if dtype == torch.float32 else 3e-2
    assert (got - want).abs().max() <= tol * want.abs().max()
    for some in (ids[:1], ids):  # what is cached for one token is not run for several, nor for one
        assert (factored(some).logits - got[: len(some)]).abs().max() <= tol * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_prompt_longer_than_a_few_tokens(dtype: torch.dtype):
    """Rows put in order by another kernel, sums written in place: the same as with gradients."""
    model = fitted("llama")
    factorize(model)
    model.to(dtype)
    ids = torch.randint(3, 100, (2, 30), generator=torch.Generator().manual_seed(2))
    assert ids.numel() > FEW
    got = model(ids).logits
    with torch.enable_grad():
        want = model(ids).logits.detach()
    tol = 1e-6 if dtype == torch.float32 else 2e-2
    assert (got - want).abs().max() <= tol * want.abs().max()
    assert torch.equal(model(ids).logits, got)  # nothing that is used again was written to


@pytest.mark.parametrize("way", ["by_columns", "by_factor", ""])
@torch.no_grad()
def test_every_way_to_put_a_prompt_in_order(way: str, monkeypatch: pytest.MonkeyPatch):
    """Columns, the rows of the factor, or (neither) the rows of what is computed: the same."""
    dense = fitted("llama")
    factored = copy.deepcopy(dense)
    factorize(factored)
    taken = set()

    def choice(name: str) -> Any:
        def chosen(*_: Any, **__: Any) -> bool:
            taken.add(name)
            return name == way

        return chosen

    for name in ("by_columns", "by_factor"):
        monkeypatch.setattr(ordering, name, choice(name))
    ids = IDS.repeat(1, 5)
    got, want = factored(ids).logits, dense(ids).logits
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert way in taken | {""}


@pytest.mark.parametrize(("speed", "rank", "expected"), [(1, 160, True), (1, 288, False),
    (6, 288, True), (6, 540, False), (2.9, 288, False), (3.1, 288, True)])  # fmt: skip
@torch.no_grad()
def test_the_way_follows_the_machine_and_the_rank(
    speed: float, rank: int, expected: bool, monkeypatch: pytest.MonkeyPatch
):
    """An output projection of SmolLM2, of 576 features, and 512 tokens in 16 bits."""
    monkeypatch.setattr(ordering, "speed_of", lambda dtype: speed)
    x, moves = torch.empty(1, 512, 576, dtype=torch.bfloat16), low_rank.moves_of("o")
    assert not ordering.by_columns(x)
    assert ordering.by_factor(x, 576, rank, moves) == expected
    assert ordering.by_columns(x.float())
    with torch.enable_grad():
        assert not ordering.by_columns(x.float())
        assert not ordering.by_factor(x, 576, rank, moves)


def test_an_expanded_factor_is_that_of_its_pivots():
    """The rows of a matrix of rank 5, from five of its rows, in double precision."""
    draws = torch.Generator().manual_seed(0)
    matrix = torch.randn(12, 5, dtype=torch.float64, generator=draws)
    rows = torch.tensor([1, 4, 5, 9, 11])
    others = torch.tensor([n for n in range(12) if n not in rows])
    mix = matrix[others] @ torch.linalg.inv(matrix[rows])
    got = ordering.expanded(mix, torch.argsort(torch.cat([rows, others])))
    torch.testing.assert_close(got @ matrix[rows], matrix)
    assert torch.equal(got[rows], torch.eye(5, dtype=torch.float64))


def decoded(model: Any, cache: Any, start: int, stop: int) -> torch.Tensor:
    """Logits of tokens one by one."""
    steps = [model(IDS[:, i : i + 1], past_key_values=cache).logits for i in range(start, stop)]
    return torch.cat(steps, dim=1)


@torch.no_grad()
def test_caches_that_share_their_beginning_do_not_write_over_each_other(
    monkeypatch: pytest.MonkeyPatch,
):
    """One of two copies that share tensors is cut back and goes on with other tokens."""
    monkeypatch.setattr("tensorllm.runtime.cache.ROOM", 5)
    dense = fitted("llama")
    model = copy.deepcopy(dense)
    factorize(model)
    caches = [of(IDS[:, :6], use_cache=True).past_key_values for of in (model, dense)]
    decoded(model, caches[0], 6, 8), decoded(dense, caches[1], 6, 8)
    layers = caches[0].layers
    assert all(isinstance(layer, GrowingLayer) and layer.room is not None for layer in layers)
    other = copy.copy(caches[0])
    other.layers = [copy.copy(layer) for layer in layers]
    before = layers[0].keys.clone()
    other.crop(-1)
    model(IDS[:, :2].flip(0), past_key_values=other)
    assert torch.equal(layers[0].keys, before)
    got, want = decoded(model, caches[0], 8, 11), decoded(dense, caches[1], 8, 11)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@torch.no_grad()
def test_beams_and_a_compiler_take_a_cache_that_grows():
    dense = fitted("llama")
    model = copy.deepcopy(dense)
    factorize(model)
    settings = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **settings), dense.generate(IDS, **settings))
    cache = model(IDS[:, :8], use_cache=True).past_key_values
    decoded(model, cache, 8, 9)
    want = model(IDS[:, 9:10], past_key_values=copy.deepcopy(cache)).logits
    compiled = torch.compile(model, backend="eager")
    got = compiled(IDS[:, 9:10], past_key_values=cache).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
