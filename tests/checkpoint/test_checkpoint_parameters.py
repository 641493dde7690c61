"""What a folder's files hold beside parameters is not counted, not checked and decides nothing."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY, tiny_model
from torch import Tensor

import tensorllm as tl
from tensorllm.calibration.layers import InMemory, OnDisk
from tensorllm.checkpoint.loader import Loader
from tensorllm.checkpoint.reader import Checkpoint
from tensorllm.compression.engine import compress_folder
from tensorllm.compression.task import FolderTask
from tensorllm.compression.units import open_checkpoint
from tensorllm.compressors.laser import LaserSVD
from tensorllm.errors import UserError

Weights = dict[str, Tensor]


def saved(
    folder: Path, name: str, edit: Callable[[Weights], Weights] = lambda w: w, **config: Any
) -> Path:
    """A tiny model's folder, its weights as `edit` leaves them."""
    tiny_model(name, **config).save_pretrained(folder)
    path = folder / "model.safetensors"
    save_file(edit(load_file(path)), path, {"format": "pt"})
    return folder


def count(name: str, **config: Any) -> int:
    return sum(p.numel() for p in tiny_model(name, **config).parameters())


@pytest.mark.parametrize("name", TINY)
def test_parameters_are_those_of_the_model(tmp_path: Path, name: str) -> None:
    checkpoint, _ = open_checkpoint(saved(tmp_path, name))
    assert checkpoint.parameters == count(name)
    assert checkpoint.dtype == "float32"


@pytest.mark.parametrize(
    ("name", "constant", "value"),
    [
        ("gpt2", "transformer.h.0.attn.bias", torch.ones(1, 1, 300, 300)),
        ("gpt2", "transformer.h.1.attn.bias", torch.ones(1, 1, 300, 300, dtype=torch.bool)),
        ("gptj", "transformer.h.0.attn.masked_bias", torch.tensor(float("-inf"))),
        ("gpt_neox", "gpt_neox.layers.1.attention.bias", torch.ones(1, 1, 64, 64).bool()),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", torch.full((6,), torch.nan)),
        ("bert", "bert.embeddings.position_ids", torch.arange(64)[None]),
    ],
)
def test_constants_are_no_parameters(
    tmp_path: Path, name: str, constant: str, value: Tensor
) -> None:
    folder = saved(tmp_path / "in", name, lambda w: {**w, constant: value})
    checkpoint, _ = open_checkpoint(folder)
    assert checkpoint.parameters == count(name)
    assert checkpoint.dtype == "float32"
    report = compress_folder(
        FolderTask(source=folder, target=tmp_path / "out", compressor=LaserSVD(rho=0.5))
    )
    assert report.totals.parameters_before == count(name)
    assert tl.load(tmp_path / "out") is not None


def test_constants_keep_their_dtype(tmp_path: Path) -> None:
    constant = "transformer.h.0.attn.masked_bias"
    folder = saved(tmp_path / "in", "gptj", lambda w: {**w, constant: torch.tensor(-1e9)})
    task = FolderTask(
        source=folder, target=tmp_path / "out", compressor=LaserSVD(rho=0.5), dtype=torch.float16
    )
    compress_folder(task)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written[constant] == -1e9
    assert written["transformer.h.0.attn.q_proj.weight"].dtype == torch.float16


@pytest.mark.parametrize(
    ("name", "head"), [("llama", "lm_head.weight"), ("gpt2", "lm_head.weight")]
)
def test_a_tied_pair_that_is_stored_twice_counts_once(tmp_path: Path, name: str, head: str) -> None:
    def doubled(weights: Weights) -> Weights:
        table = next(w for n, w in weights.items() if "embed_tokens" in n or "wte" in n)
        return {**weights, "lm_head.weight": table.clone()}

    tied = {"tie_word_embeddings": True}
    folder = saved(tmp_path, name, doubled, **tied)
    assert open_checkpoint(folder)[0].parameters == count(name, **tied)
    assert sum(p.numel() for p in Loader(folder)().parameters()) == count(name, **tied)


def test_a_tied_pair_with_two_values_counts_twice(tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True}
    folder = saved(
        tmp_path, "llama", lambda w: {**w, "lm_head.weight": torch.ones(101, 32)}, **tied
    )
    assert open_checkpoint(folder)[0].parameters == count("llama", **tied) + 101 * 32


def test_streamed_and_in_memory_agree(tmp_path: Path) -> None:
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 300, 300, dtype=torch.bool)}
    folder = saved(tmp_path, "gpt2", lambda w: {**w, **mask})
    model = Loader(folder)()
    disk = OnDisk(folder)
    assert disk.parameters == InMemory(model).parameters
    assert disk.dtype == model.dtype


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_other_dtypes_are_one_line(tmp_path: Path, dtype: torch.dtype) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    folder = saved(tmp_path, "llama", lambda w: {**w, name: w[name].to(dtype)})
    with pytest.raises(UserError, match=rf"{name} is stored as .*must be one of F64, F32"):
        open_checkpoint(folder)
    with pytest.raises(UserError, match=r"up_proj.weight is stored as"):
        Loader(folder)()


def test_compress_refuses_what_evaluate_refuses(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", lambda w: {f"_orig_mod.{n}": t for n, t in w.items()})
    with pytest.raises(UserError, match="_orig_mod"):
        open_checkpoint(folder)


def test_a_base_model_without_a_name_is_compressed(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    tiny_model("llama", headless=True).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint, _ = open_checkpoint(folder)
    assert checkpoint.parameters == count("llama", headless=True)


def test_a_single_file_goes_before_an_index(tmp_path: Path, caplog: Any) -> None:
    """As transformers reads it: the shards are of an older save, there or not."""
    model = tiny_model("llama")
    tiny_model("llama", seed=1).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(Checkpoint(tmp_path)._files()) > 1
    model.save_pretrained(tmp_path)
    index = {"weight_map": dict.fromkeys(("a", "b"), "model-00001-of-00009.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with caplog.at_level(logging.WARNING):
        checkpoint, _ = open_checkpoint(tmp_path)
    assert "an index of shards" in caplog.text
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(checkpoint.read([name])[name], model.state_dict()[name])
    assert torch.equal(Loader(tmp_path)().state_dict()[name], model.state_dict()[name])


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("llama", "num_attention_heads"),
        ("llama", "num_key_value_heads"),
        ("llama", "hidden_size"),
        ("llama", "num_hidden_layers"),
        ("llama", "vocab_size"),
        ("gpt2", "n_head"),
        ("distilbert", "n_heads"),
    ],
)
@pytest.mark.parametrize("value", [0, -4, 1.5, "8", True])
def test_impossible_sizes_are_named(tmp_path: Path, name: str, size: str, value: Any) -> None:
    folder = saved(tmp_path, name)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {size: value}))
    want = rf"config.json: {size} must be a whole number of 1 or more, got {value!r}"
    with pytest.raises(UserError, match=want):
        open_checkpoint(folder)
    with pytest.raises(UserError, match=want):
        Loader(folder)()


def test_an_adapter_beside_a_model_is_not_passed_over(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    (folder / "adapter_config.json").write_text("{}")
    for read in (open_checkpoint, lambda f: Loader(f)()):
        with pytest.raises(UserError, match="holds an adapter beside a model"):
            read(folder)
