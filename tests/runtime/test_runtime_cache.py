"""What attention caches: latents, keys and values as wide as a head, or by prediction."""

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY, tiny_model
from transformers import AutoModelForCausalLM

import tensorllm as tl
from tensorllm.checkpoint.loader import Loader
from tensorllm.checkpoint.loading import cache_elsewhere
from tensorllm.compression.factorize import factorize
from tensorllm.compressors import Site
from tensorllm.errors import UserError
from tensorllm.runtime import cache as growing
from tensorllm.runtime.cache import GrowingLayer
from tensorllm.runtime.cost import keeps_dense_cache
from tensorllm.tensors.factors import LowRank, Tucker
from tensorllm.tensors.stacking import ATTENTION, Geometry

CAUSAL = [name for name, row in TINY.items() if row.task == "causal"]
IDS = torch.randint(3, 100, (2, 11), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS).index_fill(1, torch.arange(4), 0)  # of padding on the left
CACHES = ("latent", "dense", "auto")


def compressed(name: str) -> Any:
    model = tiny_model(name)
    tl.compress(model, tl.SharedTucker4D(ranks=(20, 3, 2)))
    return model


def cached(model: Any) -> list[tuple[int, int]]:
    """Widths of the keys and values of each layer."""
    layers = model(IDS, use_cache=True).past_key_values.layers
    return [(layer.keys.shape[-1], layer.values.shape[-1]) for layer in layers]


def written(model: Any) -> torch.Tensor:
    tokens = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    made: torch.Tensor = model.generate(IDS, attention_mask=MASK, **tokens)
    return made


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_numbers_and_texts_are_the_same_and_only_sizes_differ(name: str):
    dense = compressed(name)
    want, text = dense(IDS, attention_mask=MASK).logits[:, 4:], written(dense)
    widths = {}
    for cache in CACHES:
        model = copy.deepcopy(dense)
        factorize(model, cache=cache)
        got = model(IDS, attention_mask=MASK).logits[:, 4:]
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
        assert torch.equal(written(model), text)
        widths[cache] = cached(model)
    assert widths["dense"] == cached(dense)
    for (keys, values), (k, v) in zip(widths["latent"], widths["dense"], strict=True):
        assert keys <= k
        assert values == 3 < v
    assert widths["auto"] == widths["dense"]  # five numbers per head are not worth a second kernel


@pytest.mark.parametrize("policy", ["always", "auto"])
@torch.no_grad()
def test_a_folder_opens_with_each(policy: Any, tmp_path: Path):
    """`auto` may keep a layer dense: then it is read another way."""
    model = tiny_model("llama", intermediate_size=16_384)
    tl.compress(model, tl.Hybrid(ranks=(4, 3, 2), rho=0.2, matrices=("in",)), layers=[0])
    tl.save(model, tmp_path / "out")
    found = {c: tl.load(tmp_path / "out", policy=policy, cache=c) for c in ("latent", "dense")}
    latent, dense = (written(found[c]) for c in ("latent", "dense"))
    assert torch.equal(latent, dense)
    assert cached(found["dense"]) == cached(model)
    assert (cached(found["latent"]) != cached(model)) is (policy == "always")
    found["dense"].save_pretrained(tmp_path / "again")
    again = tl.load(tmp_path / "again", policy="always")
    assert torch.equal(written(again), dense)  # how it was run is not stored
    assert cached(again) == cached(found["latent"])


def test_gradients_are_those_of_latents():
    """Both ways learn alike."""
    gradients = []
    for cache in ("latent", "dense"):
        model = compressed("llama")
        factorize(model, cache=cache)
        model(IDS, labels=IDS).loss.backward()
        gradients.append(model.model.layers[0].self_attn.factors.u_KR.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("rank", "latent"), [(16, True), (56, False), (64, False)])
def test_auto_goes_by_what_values_save(rank: int, latent: bool):
    """The sizes of SmolLM2-135M: measured, 8 numbers less per head are slower by a few per cent."""
    geometry = Geometry(D=576, H=9, G=3, K=64, F=1536, gated=True)
    ranks = {0: torch.empty(576, 288), 1: torch.empty(64, rank), 2: torch.empty(8, 8)}
    factors = Tucker(torch.empty(288, rank, 8, 3), ranks)
    site = Site((0,), ATTENTION, "heads")
    assert keeps_dense_cache(site, factors, geometry, "auto") is not latent
    assert not keeps_dense_cache(site, factors, geometry, "latent")
    assert keeps_dense_cache(site, factors, geometry, "dense")


def test_other_factors_have_no_cache_of_their_own():
    geometry = Geometry(D=24, H=4, G=2, K=6, F=40, gated=True)
    site = Site((0,), ("v",), "matrix")
    factors = LowRank(torch.empty(12, 3), torch.empty(3, 24))
    assert not any(keeps_dense_cache(site, factors, geometry, cache) for cache in CACHES)


def test_an_unknown_cache_is_refused(tmp_path: Path):
    model = compressed("llama")
    with pytest.raises(UserError, match=r"cache.*latnt.*latent"):
        factorize(model, cache="latnt")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"cache.*latnt.*latent"):
        tl.load(tmp_path, cache="latnt")  # type: ignore[arg-type]


@torch.no_grad()
def test_what_opens_folders_by_itself_caches_as_the_process_says(tmp_path: Path):
    """A server calls `from_pretrained`, which takes no option of ours."""
    tl.save(compressed("llama"), tmp_path / "out")
    by_name = {}
    for cache in CACHES:
        with cache_elsewhere(cache):
            by_name[cache] = cached(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
            for asked in CACHES:  # what is asked for goes first
                loaded = tl.load(tmp_path / "out", policy="always", cache=asked)
                assert cached(loaded) == cached(Loader(tmp_path / "out", cache=asked)())
                assert (cached(loaded) == by_name["latent"]) is (asked == "latent")
    assert by_name["auto"] == by_name["dense"] != by_name["latent"]
    with pytest.raises(UserError, match="cache must be"), cache_elsewhere("wide"):  # type: ignore[arg-type]
        pass


def test_old_keys_are_freed_before_memory_for_more_values_is_allocated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Held together, they leave gaps of their size in the heap, in every layer."""
    given: list[Any] = []
    layer = GrowingLayer()
    keys = torch.ones(1, 2, 5, 4)
    layer.update(keys, keys)
    old = weakref.ref(layer.keys)

    def noted(t: torch.Tensor, length: int) -> torch.Tensor:
        given.append(old() is None)
        return with_room(t, length)

    with_room = growing._with_room
    monkeypatch.setattr(growing, "_with_room", noted)
    got, _ = layer.update(keys[:, :, :1], keys[:, :, :1])
    assert given == [False, True]
    assert torch.equal(got, torch.ones(1, 2, 6, 4))
