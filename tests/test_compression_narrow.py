"""A narrower checkpoint is an ordinary one that computes what the wider one does."""

import json
from pathlib import Path

import pytest
import torch
from test_activation_fit import text
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

import tensorllm as tl
from tensorllm.commands.export import run
from tensorllm.compression.narrow import narrow
from tensorllm.compressors.calibrated.modegpt import MoDeGPT
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.requests.others import ExportRequest

IDS = torch.arange(3, 14)[None]
FFN = ("in", "gate", "out")


def saved(architecture: str, folder: Path, format: str, kept: float = 0.4) -> torch.Tensor:
    """Logits of a model whose FFN channels were dropped, saved to the folder."""
    model = tiny_model(architecture)
    roles = RoleMatrices(model.config, parameters_of(model)).spec.roles
    matrices = tuple(role for role in FFN if role in roles)
    tl.compress(model, MoDeGPT(kept=kept, matrices=matrices), calibration=text())
    tl.save(model, folder, format=format)
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "gptj", "opt"])
@pytest.mark.parametrize("format", ["dense", "factored"])
def test_plain_transformers_gets_the_same_logits(architecture: str, format: str, tmp_path: Path):
    want = saved(architecture, tmp_path / "wide", format)
    made = narrow(tmp_path / "wide", tmp_path / "narrow")
    assert made.after % 8 == 0
    assert made.after < made.before
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, want, atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "narrow" / "config.json").read_text())
    assert made.after in config.values()


def test_the_command_says_the_width(tmp_path: Path):
    saved("llama", tmp_path / "wide", "factored")
    done = run(ExportRequest(folder=tmp_path / "wide", out=tmp_path / "out", format="narrow"))
    assert done.to_json()["ffn_width"] == 24
    assert "FFN width 56 → 24" in str(done)


def test_what_has_no_dead_channel_is_refused(tmp_path: Path):
    tiny_model("llama").save_pretrained(tmp_path / "whole")
    with pytest.raises(UserError, match=r"reads 56 of its 56 FFN channels.*--mode modegpt"):
        narrow(tmp_path / "whole", tmp_path / "narrow")
    assert not (tmp_path / "narrow").exists()
