"""Folders that are odd and right, and such that are refused in one line with what to do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from tensorllm.checkpoint.loader import Loader
from tensorllm.checkpoint.source import resolve
from tensorllm.compression.engine import compress, compress_folder
from tensorllm.compression.save import save
from tensorllm.compression.task import FolderTask
from tensorllm.compressors.settings import make_compressor
from tensorllm.errors import UserError
from tensorllm.models.shrink import shrunk

TUCKER = make_compressor("shared-tucker", {"ranks": (8, 4, 3)})
IDS = torch.tensor([[7, 41, 19, 78]])


def saved(model: Any, folder: Path, **config: Any) -> Path:
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def compressed(source: Path, target: Path, **given: Any) -> Path:
    compress_folder(FolderTask(source=source, target=target, compressor=TUCKER, **given))
    return target


def refused(source: Path, words: str, **given: Any) -> None:
    target = source.parent / "out"
    with pytest.raises(UserError, match=words) as error:
        compressed(source, target, **given)
    assert "\n" not in str(error.value)
    assert not target.exists()


@pytest.mark.parametrize("method", ["fp8", "bitsandbytes", "gptq"])
def test_quantised_weights_are_refused_by_name(method: str, tmp_path: Path) -> None:
    folder = saved(
        tiny_model("llama"), tmp_path / "model", quantization_config={"quant_method": method}
    )
    refused(folder, rf"quantised by {method}.*dequantize\(\)")


def test_weights_in_eight_bits_are_refused_by_name(tmp_path: Path) -> None:
    folder = saved(tiny_model("llama"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused(folder, f"{name} is stored as F8_E4M3")


def test_an_adapter_alone_is_refused_with_how_to_merge_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "adapter.*merge_and_unload")


def test_a_gguf_file_is_refused_with_the_lines_that_convert_it(tmp_path: Path) -> None:
    file = tmp_path / "model.Q4_K_M.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"GGUF.*gguf_file='model.Q4_K_M.gguf'.*save_pretrained"):
        resolve(str(file))


def test_remote_code_is_refused_and_said(tmp_path: Path) -> None:
    folder = saved(
        tiny_model("llama"),
        tmp_path / "model",
        model_type="my_own",
        auto_map={"AutoConfig": "configuration_my_own.MyConfig"},
    )
    refused(folder, "'my_own' model is remote.*trust_remote_code")


def test_an_index_may_name_tensors_that_no_shard_holds(tmp_path: Path) -> None:
    model = tiny_model("llama")
    folder = tmp_path / "model"
    model.save_pretrained(folder, max_shard_size="20kB")
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    shard = next(iter(values["weight_map"].values()))
    values["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = shard
    index.write_text(json.dumps(values))
    opened = AutoModelForCausalLM.from_pretrained(compressed(folder, tmp_path / "out"))
    compress(model, TUCKER)
    torch.testing.assert_close(opened(IDS).logits, model(IDS).logits)


def test_a_vocabulary_padded_beyond_the_tokens_is_kept(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=128)  # a tokenizer may have 101 of them
    folder = saved(model, tmp_path / "model")
    opened = AutoModelForCausalLM.from_pretrained(compressed(folder, tmp_path / "out"))
    assert opened.get_input_embeddings().weight.shape[0] == 128


@pytest.mark.parametrize("width", [12, 24])
def test_heads_need_not_add_up_to_the_model_width(width: int, tmp_path: Path) -> None:
    model = tiny_model("llama", head_dim=width)
    folder = saved(model, tmp_path / "model")
    opened = AutoModelForCausalLM.from_pretrained(compressed(folder, tmp_path / "out"))
    compress(model, TUCKER)
    torch.testing.assert_close(opened(IDS).logits, model(IDS).logits)


def test_mixed_dtypes_stay_as_they_are(tmp_path: Path) -> None:
    folder = saved(tiny_model("llama"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    half = {n: w.to(torch.bfloat16) if "mlp" in n else w for n, w in weights.items()}
    save_file(half, folder / "model.safetensors", {"format": "pt"})
    after = load_file(compressed(folder, tmp_path / "out") / "model.safetensors")
    assert {n: w.dtype for n, w in after.items()} == {n: w.dtype for n, w in half.items()}


@pytest.mark.parametrize("model_type", ["xlm-roberta", "electra", "modernbert", "camembert"])
def test_a_sentence_embedder_keeps_its_pooling(model_type: str, tmp_path: Path) -> None:
    """A base model without a head, in the folder of a sentence-transformers pipeline."""
    torch.manual_seed(0)
    config = shrunk(AutoConfig.for_model(model_type), 2)
    model = AutoModel.from_config(config).eval()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    modules = [{"idx": 0, "name": "0", "path": ""}, {"idx": 1, "name": "1", "path": "1_Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    out = compressed(folder, tmp_path / "out")
    assert json.loads((out / "modules.json").read_text()) == modules
    assert (out / "1_Pooling" / "config.json").is_file()
    opened = AutoModel.from_pretrained(out).eval()
    with torch.no_grad():
        before, after = (m(input_ids=IDS).last_hidden_state for m in (model, opened))
        compress(model, TUCKER)
        torch.testing.assert_close(after, model(input_ids=IDS).last_hidden_state)
    assert not torch.equal(before, after)
    assert type(Loader(out, language=False)()) is type(model)


def test_matrices_that_files_store_joined_are_refused_with_what_to_do(tmp_path: Path) -> None:
    """Nomic's files hold q, k and v fused, its model in transformers does not."""
    torch.manual_seed(0)
    config = shrunk(AutoConfig.for_model("nomic_bert"), 2)
    model = AutoModelForMaskedLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "model")
    refused(tmp_path / "model", "q_proj.weight joined.*save_original_format=False")
    model.save_pretrained(tmp_path / "own", save_original_format=False)
    opened = AutoModelForMaskedLM.from_pretrained(compressed(tmp_path / "own", tmp_path / "o"))
    compress(model, TUCKER)
    with torch.no_grad():
        want = model(input_ids=IDS).logits
        torch.testing.assert_close(opened(input_ids=IDS).logits, want)
        save(model, tmp_path / "saved", format="dense")
        again = AutoModelForMaskedLM.from_pretrained(tmp_path / "saved")
        torch.testing.assert_close(again(input_ids=IDS).logits, want)
