"""A folder that is no model, or a broken one, is one line that names it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tensorllm.checkpoint.loader import Loader, device_of
from tensorllm.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_model_comes_as_it_was_saved(folder: Path) -> None:
    model = Loader(folder)()
    assert not model.training
    for name, value in tiny_model("llama").state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert next(Loader(folder, torch.bfloat16)().parameters()).dtype == torch.bfloat16


def test_what_cannot_be_loaded_is_one_line(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model.safetensors is not a safetensors file[^\n]+$"):
        Loader(folder)()
    weights.unlink()
    with pytest.raises(UserError, match=r"llama has no model.safetensors[^\n]+$"):
        Loader(folder)()
    with pytest.raises(UserError, match=r"llama holds no tokenizer: copy tokenizer.json[^\n]+$"):
        Loader(folder).tokenizer()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot load a tokenizer from .*llama: [^\n]+$"):
        Loader(folder).tokenizer()
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"llama holds no model: [^\n]+$"):
        Loader(folder).config()


def test_a_model_that_changed_has_another_fingerprint(folder: Path) -> None:
    before = Loader(folder).fingerprint()
    assert Loader(folder).fingerprint() == before
    assert Loader(folder, torch.float16).fingerprint() != before
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert Loader(folder).fingerprint() != before


def test_devices() -> None:
    assert device_of("cpu") == "cpu"
    assert device_of("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="--device must be one of auto, cpu, cuda, mps, got 'gpu'"):
        device_of("gpu")
    with pytest.raises(UserError, match="--device cuda:99 is not available here"):
        device_of("cuda:99")


def test_decompositions_need_a_device_with_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's GPUs have none."""
    made = torch.empty

    def empty(*size: int, device: str, dtype: torch.dtype | None) -> torch.Tensor:
        if device == "mps" and dtype == torch.float64:
            raise TypeError("the MPS framework doesn't support float64\nand more")
        return made(*size, dtype=dtype)

    monkeypatch.setattr(torch, "empty", empty)
    assert device_of("mps") == "mps"
    with pytest.raises(UserError, match=r"--device mps is not available here: .* float64$"):
        device_of("mps", decomposes=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "foo"}, "KeyError: 'foo'"),
        ({"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}}, "KeyError: 'foo'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2", "rope_theta": 1e4}}, "'str'"),
        ({"pad_token_id": 999}, "Padding_idx"),
        ({"attn_implementation": "foo"}, "foo"),
    ],
)
def test_a_config_that_transformers_stumbles_over_is_one_line(
    folder: Path, changes: dict[str, Any], said: str
) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=rf"llama: [^\n]*{said}[^\n]*$"):
        Loader(folder)()


def words(folder: Path, **config: Any) -> None:
    """A tokenizer of one word."""
    Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "text"),
    [("tokenizer.json", "{}"), ("tokenizer.json", "["), ("tokenizer_config.json", "[]")],
)
def test_a_broken_tokenizer_is_one_line(folder: Path, name: str, text: str) -> None:
    words(folder, tokenizer_class="PreTrainedTokenizerFast")
    assert Loader(folder).tokenizer()("a").input_ids == [0]
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=r"cannot load a tokenizer from .*llama: [^\n]+$"):
        Loader(folder).tokenizer()


def test_a_config_without_a_vocabulary_is_no_tokenizer(folder: Path) -> None:
    """transformers makes one of special tokens alone, by which every text is empty."""
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"holds no tokenizer: copy tokenizer.json"):
        Loader(folder).tokenizer()


def test_a_length_that_is_no_number_is_told(folder: Path) -> None:
    words(folder, tokenizer_class="PreTrainedTokenizerFast", model_max_length="512")
    with pytest.raises(UserError, match=r"model_max_length .* must be a number, got '512'"):
        Loader(folder).tokenizer()


def test_a_tokenizer_s_own_code_is_never_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words(folder, tokenizer_class="My", auto_map={"AutoTokenizer": ["my.My", None]})
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked whether to run code"))
    with pytest.raises(UserError, match=r"cannot load a tokenizer .*custom code"):
        Loader(folder).tokenizer()
