"""A folder that is no model, or a broken one, is one line that names it."""

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

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
