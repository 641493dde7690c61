"""A model is loaded whole or not at all: names that do not fit are refused, in every command."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY, tiny_config, tiny_model
from torch import Tensor
from transformers import AutoModel

from tensorllm.checkpoint.loader import Loader
from tensorllm.checkpoint.reader import Checkpoint
from tensorllm.errors import UserError

Weights = dict[str, Tensor]


def saved(folder: Path, name: str, edit: Callable[[Weights], Weights], **config: Any) -> Path:
    """A tiny model's folder, its weights as `edit` leaves them."""
    tiny_model(name, **config).save_pretrained(folder)
    path = folder / "model.safetensors"
    save_file(edit(load_file(path)), path, {"format": "pt"})
    return folder


def without(ending: str) -> Callable[[Weights], Weights]:
    return lambda weights: {n: w for n, w in weights.items() if not n.endswith(ending)}


def with_tensor(name: str, *shape: int) -> Callable[[Weights], Weights]:
    return lambda weights: {**weights, name: torch.ones(shape)}


@pytest.mark.parametrize("name", TINY)
def test_each_architecture_loads_whole(tmp_path: Path, name: str) -> None:
    model = Loader(saved(tmp_path, name, lambda weights: weights))()
    for key, value in tiny_model(name).state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


def test_an_untied_head_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", without("lm_head.weight"), tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"lacks lm_head.weight, which LlamaForCausalLM needs"):
        Loader(folder)()


def test_a_tied_head_is_its_embedding(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", without("lm_head.weight"), tie_word_embeddings=True)
    model = Loader(folder)()
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "wrapped.inner."])
def test_names_behind_a_foreign_prefix_are_refused(tmp_path: Path, name: str, prefix: str) -> None:
    folder = saved(tmp_path, name, lambda weights: {prefix + n: w for n, w in weights.items()})
    with pytest.raises(UserError, match=prefix.rstrip(".")) as told:
        Loader(folder)()
    assert "\n" not in str(told.value)


def test_a_layer_beyond_the_config_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", with_tensor("model.layers.2.mlp.up_proj.weight", 56, 32))
    with pytest.raises(UserError, match=r"holds model.layers.2.*no place"):
        Loader(folder)()


def test_a_bias_that_the_config_denies_is_refused(tmp_path: Path) -> None:
    folder = saved(
        tmp_path, "llama", with_tensor("model.layers.0.mlp.up_proj.bias", 56), mlp_bias=False
    )
    with pytest.raises(UserError, match=r"holds model.layers.0.mlp.up_proj.bias.*no place"):
        Loader(folder)()


def test_another_shape_is_told_with_both(tmp_path: Path) -> None:
    def narrower(weights: Weights) -> Weights:
        name = "model.layers.1.mlp.up_proj.weight"
        return {**weights, name: weights[name][:40].clone()}

    with pytest.raises(UserError, match=r"up_proj.weight has shape \(40, 32\).*needs \(56, 32\)"):
        Loader(saved(tmp_path, "llama", narrower))()


@pytest.mark.parametrize(
    ("name", "tensor", "shape"),
    [
        ("gpt2", "transformer.h.0.attn.bias", (1, 1, 64, 64)),
        ("gptj", "transformer.h.1.attn.masked_bias", ()),
        ("gpt_neox", "gpt_neox.layers.0.attention.rotary_emb.inv_freq", (2,)),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", (6,)),
        ("bert", "bert.embeddings.position_ids", (1, 64)),
    ],
)
def test_constants_of_older_files_are_no_weights(
    tmp_path: Path, name: str, tensor: str, shape: tuple[int, ...], caplog: Any
) -> None:
    with caplog.at_level(logging.WARNING):
        Loader(saved(tmp_path, name, with_tensor(tensor, *shape)))()
    assert not [r for r in caplog.records if r.name.startswith("tensorllm")]


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("llama", "score.weight"),
        ("llama", "mtp.layers.0.proj.weight"),
        ("bert", "cls.seq_relationship.weight"),
        ("bert", "bert.pooler.dense.weight"),
    ],
)
def test_parts_that_the_class_does_not_have_are_told(
    tmp_path: Path, name: str, tensor: str, caplog: Any
) -> None:
    with caplog.at_level(logging.WARNING):
        Loader(saved(tmp_path, name, with_tensor(tensor, 2, 32)))()
    assert f"{tensor}, which" in caplog.text


@pytest.mark.parametrize("named", [None, [], ["NoSuchClass"], ["LlamaModel"]])
def test_the_row_says_the_task(tmp_path: Path, named: list[str] | None) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    config = tiny_config("llama")
    config.architectures = named
    config.save_pretrained(tmp_path)
    loaded = Loader(tmp_path)()
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert not Loader(tmp_path).masked


def test_a_base_model_has_the_head_that_is_tied_to_it(tmp_path: Path) -> None:
    AutoModel.from_config(tiny_config("gpt2")).save_pretrained(tmp_path)
    assert type(Loader(tmp_path)()).__name__ == "GPT2LMHeadModel"


def test_a_base_model_without_a_head_is_refused_where_one_is_needed(tmp_path: Path) -> None:
    config = tiny_config("roberta", tie_word_embeddings=False)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lacks lm_head.*RobertaForMaskedLM needs"):
        Loader(tmp_path)()
    assert type(Loader(tmp_path, language=False)()).__name__ == "RobertaModel"


def test_what_is_whole_is_loaded_without_a_word(tmp_path: Path) -> None:
    """transformers lists what is not shared out over GPUs where its logger has a level."""
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    library = logging.getLogger("transformers")
    library.addHandler(listener)
    try:
        Loader(saved(tmp_path, "llama", lambda weights: weights))()
    finally:
        library.removeHandler(listener)
    assert said == []


@pytest.mark.parametrize("bare_first", [True, False])
def test_of_several_classes_the_one_with_the_head_is_read(tmp_path: Path, bare_first: bool) -> None:
    """As it is scored: the head counts among the weights that are compressed or copied."""
    folder = saved(tmp_path, "llama", lambda weights: weights, tie_word_embeddings=False)
    names = ["LlamaModel", "LlamaForCausalLM"]
    path = folder / "config.json"
    named = {"architectures": names if bare_first else names[::-1]}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    model = Loader(folder, language=False)()
    assert type(model) is type(Loader(folder)())
    checkpoint = Checkpoint(folder)
    assert "lm_head.weight" in checkpoint.weights
    assert not checkpoint.unused
