"""A narrower checkpoint is an ordinary one that computes what the wider one does."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_text import text
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

import tensorllm as tl
from tensorllm.checkpoint.writer import ShardWriter
from tensorllm.commands.export import run
from tensorllm.compression import prepare
from tensorllm.compression.dry_run import dry_run
from tensorllm.compression.engine import compress_folder
from tensorllm.compression.narrow import narrow
from tensorllm.compression.task import FolderTask
from tensorllm.compressors import SVDLLM, ActivationHybrid
from tensorllm.compressors.calibrated.modegpt import MoDeGPT
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.requests.others import ExportRequest

IDS = torch.arange(3, 14)[None]
FFN = ("in", "gate", "out")


def bloom() -> BloomForCausalLM:  # its FFN is always four times as wide as the model
    return BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=120))


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


def test_a_killed_run_is_not_gone_on_from_with_other_weights(tmp_path: Path, monkeypatch: Any):
    """Of the same names and widths: the journal must not say that they are written already."""
    saved("llama", tmp_path / "wide", "dense")
    small = partial(ShardWriter, shard_bytes=2**12)
    monkeypatch.setattr("tensorllm.compression.narrow.ShardWriter", small)

    def killed(writer: ShardWriter) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "name_files", killed)
        with pytest.raises(KeyboardInterrupt):
            narrow(tmp_path / "wide", tmp_path / "narrow")
    assert list((tmp_path / ".narrow.partial").glob("*.safetensors"))
    file = tmp_path / "wide" / "model.safetensors"
    save_file({n: -w for n, w in load_file(file).items()}, file, metadata={"format": "pt"})
    narrow(tmp_path / "wide", tmp_path / "narrow")
    narrow(tmp_path / "wide", tmp_path / "fresh")
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("narrow", "fresh"))
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def test_what_has_no_dead_channel_is_refused(tmp_path: Path):
    tiny_model("llama").save_pretrained(tmp_path / "whole")
    with pytest.raises(UserError, match=r"reads 56 of its 56 FFN channels.*--mode modegpt"):
        narrow(tmp_path / "whole", tmp_path / "narrow")
    assert not (tmp_path / "narrow").exists()


def task(folder: Path, architecture: str, compressor: Any, **more: Any) -> FolderTask:
    if not (folder / "whole").exists():
        model = bloom() if architecture == "bloom" else tiny_model(architecture)
        model.save_pretrained(folder / "whole")
    return FolderTask(
        source=folder / "whole",
        target=folder / "out",
        compressor=compressor,
        format="narrow",
        **{"calibration": text()} | more,
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_compress_writes_what_the_two_commands_would(architecture: str, tmp_path: Path):
    roles = RoleMatrices(tiny_model(architecture).config, parameters_of(tiny_model(architecture)))
    matrices = tuple(role for role in FFN if role in roles.spec.roles)
    asked = task(tmp_path, architecture, MoDeGPT(kept=0.4, matrices=matrices))
    planned = dry_run(asked)
    report = compress_folder(asked)
    saved(architecture, tmp_path / "wide", "factored")
    narrow(tmp_path / "wide", tmp_path / "by export")
    names = {"model.safetensors", "config.json", "tensorllm.json", "report.json", "README.md"}
    for folder in ("out", "by export"):
        assert names <= {path.name for path in (tmp_path / folder).iterdir()}
    weights = [load_file(tmp_path / f / "model.safetensors") for f in ("out", "by export")]
    assert weights[0].keys() == weights[1].keys()
    for name, w in weights[0].items():
        torch.testing.assert_close(w, weights[1][name])
    stored = sum(w.numel() for w in weights[0].values())
    assert report.totals.parameters_after == planned.parameters_after == stored
    assert planned.bytes_after == pytest.approx(report.totals.bytes_after, rel=0.02)
    reports = [json.loads((tmp_path / f / "report.json").read_text()) for f in ("out", "by export")]
    assert reports[0]["ffn_width"] == reports[1]["ffn_width"]
    assert reports[0]["ffn_width"]["after"] < reports[0]["ffn_width"]["before"]
    assert reports[1]["totals"]["parameters_after"] == stored
    assert reports[1]["ratios"]["whole_model"] == pytest.approx(report.ratios()["whole_model"])
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert data.library_name == "transformers"
    tl.load(tmp_path / "out", verify=True)


@pytest.mark.parametrize("ratio", [1.2, 2.0])
def test_a_target_is_met_by_channels_alone_the_same_number_everywhere(ratio: float, tmp_path: Path):
    """Nothing else gets smaller by being written dense, so nothing else is touched."""
    strategy = ActivationHybrid(target_ratio=ratio, refit_epochs=0)
    asked = task(tmp_path, "llama", strategy)
    assert dry_run(asked).bytes_after is None  # the fit will tell
    made = compress_folder(asked)
    width = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size
    assert width == 8 * int(56 / ratio / 8)  # the widest that is within the target
    assert {site.kind for site in made.sites} == {"kept-rows"}
    assert [site.ranks for site in made.sites] == [(3 * width,)] * 2
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("whole", "out"))
    changed = {name.split(".")[-2] for name, w in before.items() if not torch.equal(w, after[name])}
    assert changed == {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("architecture", "strategy", "message"),
    [
        ("bloom", MoDeGPT(kept=0.4), "the class of bloom takes no other FFN width"),
        ("llama", SVDLLM(kept=0.5), "layer 0 reads 56 of its 56 FFN channels"),
        ("llama", MoDeGPT(kept=0.99), "layer 0 reads 55 of its 56 FFN channels"),
        ("llama", MoDeGPT(kept=0.4, matrices=("v", "o")), "layer 0 reads 56 of its 56"),
    ],
)
def test_what_cannot_be_narrower_is_refused_before_the_fit(
    architecture: str, strategy: Any, message: str, tmp_path: Path, monkeypatch: Any
):
    monkeypatch.setattr(prepare, "_fitted", lambda *_: pytest.fail("fitted"))
    asked = task(tmp_path, architecture, strategy)
    for run_it in (compress_folder, dry_run):
        with pytest.raises(UserError, match=f"^--format narrow: {message}"):
            run_it(asked)
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_a_layer_that_is_left_out_keeps_all_as_wide(tmp_path: Path):
    with pytest.raises(UserError, match="layer 0 reads 56 of its 56"):
        compress_folder(task(tmp_path, "llama", MoDeGPT(kept=0.4), layers=[1]))


def test_a_model_in_memory_is_saved_narrow(tmp_path: Path):
    model = tiny_model("llama")
    tl.compress(model, MoDeGPT(kept=0.4, matrices=FFN), calibration=text())
    tl.save(model, tmp_path / "out", format="narrow")
    with torch.no_grad():
        got, want = tl.load(tmp_path / "out")(IDS).logits, model(IDS).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
