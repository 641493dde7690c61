"""A factored model computes what its dense reconstruction does, for every architecture."""

import copy
import shutil
from typing import Any

import pytest
import torch
from tiny_models import TINY, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache

import tensorllm as tl
from tensorllm.compression.engine import compression_of
from tensorllm.compression.factorize import factorize
from tensorllm.errors import UserError
from tensorllm.runtime.attention import FactoredAttention, attend
from tensorllm.runtime.tucker import HeadsSite

CAUSAL = [name for name, row in TINY.items() if row.task == "causal"]
# Ranks of the latent width below, and at, that of a head; the stack factor thin and square.
THIN = tl.Hybrid(ranks=(20, 3, 2), rho=0.4, matrices=("in", "out"))


def pair(name: str, compressor: Any = THIN, dtype: Any = None, **config: Any) -> tuple[Any, Any]:
    """A compressed model, dense, and the same running in its factors."""
    dense = tiny_model(name, **config)
    if dtype is not None:
        dense = dense.to(dtype)
    tl.compress(dense, compressor)
    factored = copy.deepcopy(dense)
    factorize(factored)
    return dense, factored


def prompts(tokens: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of tokens, the first padded on the left."""
    ids = torch.randint(3, 100, (2, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return ids, mask


def same(got: torch.Tensor, want: torch.Tensor, tol: float = 1e-5) -> None:
    assert (got - want).abs().max() <= tol * want.abs().max()


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("ranks", [(20, 3, 2), (32, 7, 4)])
@torch.no_grad()
def test_logits_agree(name: str, ranks: tuple[int, int, int]):
    dense, factored = pair(name, tl.SharedTucker4D(ranks=ranks))
    ids, mask = prompts()
    if TINY[name].task == "masked":
        mask = mask.flip(1)  # encoders are padded on the right
    want = dense(ids, attention_mask=mask).logits
    same(factored(ids, attention_mask=mask).logits[mask.bool()], want[mask.bool()])


@pytest.mark.parametrize("name", sorted(set(TINY) - {"gptj", "gemma2"}))
@torch.no_grad()
def test_sdpa_agrees(name: str):
    dense, factored = pair(name)
    for model in (dense, factored):
        model.set_attn_implementation("sdpa")
    ids, _ = prompts()
    same(factored(ids).logits, dense(ids).logits)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_bfloat16_agrees_within_its_rounding(name: str):
    dense, factored = pair(name, dtype=torch.bfloat16)
    ids, _ = prompts()
    exact = copy.deepcopy(dense).float()(ids).logits
    rounding = (dense(ids).logits.float() - exact).norm()
    assert (factored(ids).logits.float() - exact).norm() <= 3 * rounding + 1e-2 * exact.norm()


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_step_by_step_agrees_with_all_at_once(name: str):
    _, factored = pair(name)
    ids, _ = prompts()
    want = factored(ids).logits
    cache = DynamicCache(config=factored.config)
    steps = [
        factored(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits
        for i in range(ids.shape[1])
    ]
    same(torch.cat(steps, dim=1), want)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_agrees(name: str, beams: int):
    dense, factored = pair(name)
    ids, mask = prompts()
    settings = {
        "attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "num_beams": beams,
        "pad_token_id": 2, "eos_token_id": None,
    }  # fmt: skip
    assert torch.equal(factored.generate(ids, **settings), dense.generate(ids, **settings))


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_the_cache_holds_latents(name: str):
    dense, factored = pair(name)
    ids, _ = prompts()
    of_dense, of_factored = (
        model(ids, use_cache=True).past_key_values for model in (dense, factored)
    )
    for wide, narrow in zip(of_dense.layers, of_factored.layers, strict=True):
        assert narrow.values.shape[-1] == 3
        heads = narrow.values.shape[1] / wide.values.shape[1]
        assert narrow.values.nbytes * wide.values.shape[-1] == wide.values.nbytes * 3 * heads
        assert narrow.keys.nbytes <= wide.keys.nbytes


@pytest.mark.parametrize("name", ["gptj", "gpt2", "opt"])
@torch.no_grad()
def test_keys_stay_latent_where_they_are_not_rotated(name: str):
    _, factored = pair(name)
    ids, _ = prompts()
    keys = factored(ids, use_cache=True).past_key_values.layers[0].keys
    rotated = getattr(factored.config, "rotary_dim", 0) or 0
    assert keys.shape[-1] == rotated + 3  # heads are 8 wide


@pytest.mark.parametrize("name", ["llama", "gptj", "gpt2", "bert"])
@torch.no_grad()
def test_probabilities_are_those_of_the_dense_model(name: str):
    dense, factored = pair(name)
    ids, _ = prompts()
    want = dense(ids, output_attentions=True).attentions
    got = factored(ids, output_attentions=True).attentions
    assert len(got) == len(want) == 2
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@torch.no_grad()
def test_what_was_reported_stays_what_it_was():
    """The modules may hold the very factors of the record when they absorb the small one."""
    model = tiny_model("gptj")
    tl.compress(model, tl.SharedTucker4D(ranks=(20, 3, 4)))
    factors = compression_of(model).sites[0].factors
    before = {name: t.clone() for name, t in factors.tensors().items()}
    factorize(model)
    assert all(torch.equal(t, before[name]) for name, t in factors.tensors().items())


@torch.no_grad()
def test_float64_stays_float64():
    """Also where the stack factor is absorbed into the core, which narrow types do in float32."""
    dense, factored = pair("llama", tl.SharedTucker4D(ranks=(20, 3, 6)), dtype=torch.float64)
    ids, _ = prompts()
    same(factored(ids).logits, dense(ids).logits, tol=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "opt", "bert"])
@torch.no_grad()
def test_probabilities_of_sdpa_are_those_of_eager(name: str):
    """Left without a mask sdpa makes the causal one itself; so must what stands in for it."""
    dense, factored = pair(name)
    ids, _ = prompts()
    want = dense(ids, output_attentions=True)
    factored.set_attn_implementation("sdpa")
    got = factored(ids, output_attentions=True)
    same(got.logits, want.logits)
    for a, b in zip(got.attentions, want.attentions, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


COMPRESSORS = {
    "laser": tl.LaserSVD(rho=0.5, matrices=("in", "out", "q", "o")),
    "laser in blocks": tl.LaserSVD(rho=0.5, matrices=("in", "out", "q", "o"), blocks=2),
    "one of two fused": tl.LaserSVD(rho=0.5, matrices=("in",)),
    "per matrix": tl.PerMatrixTucker3D(ranks=(16, 5), matrices=("q", "v", "o")),
    "cp": tl.Trawl(rank=9),
    "cp, all layers": tl.Trawl(rank=9, across_layers=True),
    "tucker of whole matrices": tl.Trawl(ranks=(9, 8, 2), method="tucker"),
}


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gpt_neox", "falcon-grouped", "bert"])
@pytest.mark.parametrize("compressor", COMPRESSORS.values(), ids=COMPRESSORS)
@torch.no_grad()
def test_every_kind_of_factors_runs(name: str, compressor: tl.Compressor):
    dense, factored = pair(name, compressor)
    ids, _ = prompts()
    same(factored(ids).logits, dense(ids).logits)


@torch.no_grad()
def test_positions_that_are_added_to_scores_run_as_linears():
    dense, factored = pair("falcon-heads", alibi=True)
    ids, _ = prompts()
    same(factored(ids).logits, dense(ids).logits)
    assert not any(isinstance(m, FactoredAttention) for m in factored.modules())


@torch.no_grad()
def test_a_static_cache_gives_the_same_tokens():
    dense, factored = pair("llama")
    ids, _ = prompts()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    cache = StaticCache(config=factored.config, max_cache_len=32)
    got = factored.generate(ids, past_key_values=cache, disable_compile=True, **settings)
    assert torch.equal(got, dense.generate(ids, **settings))
    assert cache.layers[0].values.shape[-1] == 3


def test_attention_compiles_without_a_break():
    _, factored = pair("llama")
    ids, _ = prompts()
    with torch.no_grad():
        want = factored(ids, use_cache=False).logits
        compiled = torch.compile(factored, fullgraph=True, backend="eager")
        same(compiled(ids, use_cache=False).logits, want)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_code_computes_the_same():
    """By the C++ compiler where there is one, else by what is traced for it."""
    _, factored = pair("llama")
    ids, _ = prompts()
    backend = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"
    with torch.no_grad():
        want = factored(ids, use_cache=False).logits
        compiled = torch.compile(factored, fullgraph=True, backend=backend)
        same(compiled(ids, use_cache=False).logits, want)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # flex attention's own: it is slow where not compiled
@torch.no_grad()
def test_flex_attention_agrees():
    dense, factored = pair("llama")
    ids, mask = prompts(16)
    want = dense(ids, attention_mask=mask).logits
    factored.set_attn_implementation("flex_attention")
    got = factored(ids, attention_mask=mask).logits
    same(got[mask.bool()], want[mask.bool()])


def test_a_factored_model_learns():
    _, factored = pair("gptj")
    factored.train()
    ids, _ = prompts()
    optimizer = torch.optim.SGD(factored.parameters(), lr=0.01)
    before = factored(ids, labels=ids).loss
    before.backward()
    site = next(m for m in factored.modules() if isinstance(m, HeadsSite))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in site.parameters())
    optimizer.step()
    assert factored(ids, labels=ids).loss < before


def test_soft_capping_and_boolean_masks():
    q, k, v = (torch.randn(1, heads, 5, width) for heads, width in ((4, 6), (2, 6), (2, 3)))
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    got, weights = attend(q, k, v, mask, 0.5, softcap=1.5)
    for head in range(4):
        scores = 1.5 * torch.tanh(q[0, head] @ k[0, head // 2].mT * 0.5 / 1.5)
        want = torch.softmax(scores.masked_fill(~mask[0, 0], float("-inf")), -1)
        torch.testing.assert_close(weights[0, head], want)
        torch.testing.assert_close(got[0, :, head], want @ v[0, head // 2])


def test_auto_keeps_dense_what_would_not_gain():
    model = tiny_model("llama", intermediate_size=16_384)
    tl.compress(model, tl.Hybrid(ranks=(32, 8, 6), rho=0.2, matrices=("in",)))
    choices = {choice.site: choice for choice in factorize(model, policy="auto")}
    assert not choices["layers.0.qkvo"].factored
    assert "not smaller" in choices["layers.0.qkvo"].why
    assert choices["layers.0.in"].factored
    assert type(model.model.layers[0].self_attn).__name__ == "LlamaAttention"


def test_what_cannot_run_factored_says_so():
    model = tiny_model("bert")
    with pytest.raises(UserError, match="not compressed"):
        factorize(model)
    tl.compress(model, tl.SharedTucker4D(ranks=(20, 4, 2), layout="official"))
    with pytest.raises(UserError, match="cannot run factored"):
        factorize(model)
    assert not any(choice.factored for choice in factorize(model, policy="auto"))
    with pytest.raises(UserError, match="already"):
        factorize(model)


@torch.no_grad()
def test_a_trained_model_writes_the_same_story(tinystories: Any):
    dense = AutoModelForCausalLM.from_pretrained(tinystories, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tinystories)
    tl.compress(dense, tl.Hybrid(ranks=(96, 12, 4), rho=0.9))
    factored = copy.deepcopy(dense)
    factorize(factored)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    settings = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(factored.generate(ids, **settings), dense.generate(ids, **settings))


@pytest.mark.parametrize("name", ["gptj", "llama", "gemma3_text"])
@torch.no_grad()
def test_the_cache_grows_in_place_and_may_be_cut_copied_and_reordered(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tensorllm.runtime.cache.ROOM", 3)
    dense, factored = pair(name)
    ids, _ = prompts(24)
    caches = [DynamicCache(config=model.config) for model in (dense, factored)]

    def step(start: int, stop: int, rows: torch.Tensor = ids) -> None:
        got, want = (
            model(rows[:, start:stop], past_key_values=cache).logits
            for model, cache in zip((factored, dense), caches[::-1], strict=True)
        )
        same(got, want)

    step(0, 5)
    for i in range(5, 14):
        step(i, i + 1)
    before = copy.deepcopy(caches)
    for cache in caches:
        cache.crop(-4)
    step(10, 13)
    swapped = torch.tensor([1, 0])
    for cache in caches:
        cache.reorder_cache(swapped)
    step(13, 14, ids[swapped])
    caches = before  # what was copied knows nothing of all this
    step(14, 17)


@torch.no_grad()
def test_a_token_copies_nothing_that_is_cached():
    _, factored = pair("llama")
    ids, _ = prompts()
    cache = DynamicCache(config=factored.config)
    factored(ids[:, :7], past_key_values=cache)
    places = []
    for i in range(7, 10):
        factored(ids[:, i : i + 1], past_key_values=cache)
        held = cache.layers[1]
        places.append([t.untyped_storage().data_ptr() for t in (held.keys, held.values)])
    assert places[0] == places[1] == places[2]
    with torch.inference_mode():  # what was made there may not be written outside
        factored(ids[:, 4:5], past_key_values=cache)
        cache = DynamicCache(config=factored.config)
        factored(ids[:, :1], past_key_values=cache)
        factored(ids[:, 1:2], past_key_values=cache)
    factored(ids[:, 2:3], past_key_values=cache)
    assert cache.get_seq_length() == 3
