"""LoRA (peft) on every kind of factored module: trained, saved, loaded, merged back.

A kind that registers a module and has no row here fails.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, nn
from training import learn
from transformers import AutoModelForCausalLM

import tensorllm as tl
from tensorllm.calibration import Calibration
from tensorllm.checkpoint.manifest import read_manifest
from tensorllm.compression.export import quantise_folder
from tensorllm.compressors import ActivationHybrid, Job, Leaf, MoDeGPT, Site
from tensorllm.runtime.sites import _MODULES, TransposedLinear
from tensorllm.tensors.factors import FACTORS
from tensorllm.tensors.whole import Whole

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.*:FutureWarning", "ignore:fan_in_fan_out:UserWarning"
)
IDS = torch.randint(3, 100, (2, 11), generator=torch.Generator().manual_seed(0))


@tl.COMPRESSORS.register("as-it-is")
@dataclass(frozen=True, kw_only=True)
class AsItIs(Leaf):
    """Whole matrices as factors, unrounded."""

    source: ClassVar[str] = "none"

    def jobs(self, spec: Any, layers: Any) -> list[Job]:
        return [Job(Site((layer,), ("in",), "matrix"), self) for layer in layers]

    def decompose(self, w: Tensor, statistics: object = None) -> Whole:
        return Whole(w.clone())


def text() -> Calibration:
    rows = torch.randint(3, 101, (20, 16), generator=torch.Generator().manual_seed(0)).tolist()
    return Calibration(tuple(map(tuple, rows)), source="random", seed=0)


def made(name: str, mode: Any, **given: Any) -> Callable[[], Any]:
    def make() -> Any:
        model = tiny_model(name)
        tl.compress(model, mode, **given)
        return model

    return make


# Known to this file alone: suites that go through all modes would ask for a row of it.
KNOWN = {"as-it-is": tl.COMPRESSORS._entries.pop("as-it-is")}
FFN = ("in", "gate", "out")
MADE = {
    "shared-tucker": made("llama", tl.SharedTucker4D(ranks=(20, 3, 2))),
    "shared-tucker-absorbed": made("llama", tl.SharedTucker4D(ranks=(20, 3, 6))),
    "shared-tucker-linears": made("gpt2", tl.SharedTucker4D(ranks=(20, 3, 2))),
    "per-matrix-tucker": made("llama", tl.PerMatrixTucker3D(ranks=(5, 5))),
    "laser": made("llama", tl.LaserSVD(rho=0.4, matrices=("in", "out"))),
    "blocks": made("llama", tl.LaserSVD(rank=3, blocks=2, matrices=("in", "out"))),
    "trawl-cp": made("llama", tl.Trawl(rank=3)),
    "trawl-tucker": made("llama", tl.Trawl(method="tucker", ranks=(8, 8, 1), across_layers=True)),
    "experts": made("mixtral", tl.COMPRESSORS["expert-tucker"](ranks=(3, 12, 16, 0))),
    "kept-rows": made("llama", MoDeGPT(kept=0.5, matrices=FFN), calibration=text()),
    "pivoted": made("llama", ActivationHybrid(target_ratio=2.0), calibration=text()),
    "whole": made("llama", AsItIs()),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A factored folder of each row."""
    out = tmp_path_factory.mktemp("factored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tl.COMPRESSORS, "_entries", tl.COMPRESSORS._entries | KNOWN)
        for name, make in MADE.items():
            tl.save(make(), out / name)
    return {name: out / name for name in MADE}


def opened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS).logits


def lora(model: Any, **given: Any) -> Any:
    names = tl.factors_as_linears(model)
    return peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=names, **given))


def test_every_module_that_runs_factors_has_a_row(folders: dict[str, Path]):
    covered = set()
    for folder in folders.values():
        manifest = read_manifest(folder)
        assert manifest is not None
        covered |= {_MODULES[FACTORS[site.kind], site.site.stacking] for site in manifest.sites}
    assert covered == {m for m in _MODULES.values() if m.__module__.startswith("tensorllm.")}


@pytest.mark.parametrize("name", MADE)
def test_lora_is_trained_saved_loaded_and_merged_back(
    name: str, folders: dict[str, Path], tmp_path: Path
):
    model = opened(folders[name])
    start, parameters = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    adapted = lora(model)
    assert torch.allclose(logits(adapted), start, atol=1e-5)  # B begins as zero
    learn(adapted, IDS, 3)
    outputs = [m.lora_B["default"].weight for m in adapted.modules() if hasattr(m, "lora_B")]
    assert outputs
    assert all(b.abs().sum() > 0 for b in outputs)  # each one is in the model's way
    want = logits(adapted)
    assert (want - start).abs().max() > 1e-3
    with adapted.disable_adapter():
        assert torch.allclose(logits(adapted), start, atol=1e-5)

    adapted.save_pretrained(tmp_path / "adapter")
    again = opened(folders[name])
    tl.factors_as_linears(again)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(logits(again), want)

    merged = adapted.merge_and_unload()
    assert (logits(merged) - want).abs().max() < 1e-4
    merged.save_pretrained(tmp_path / "tuned")
    tuned = opened(tmp_path / "tuned")
    assert {n: p.shape for n, p in tuned.named_parameters()} == {
        n: p.shape for n, p in parameters.items()
    }
    assert (logits(tuned) - want).abs().max() < 1e-4
    assert (logits(tl.load(tmp_path / "tuned")) - want).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["per-matrix-tucker", "trawl-cp", "experts"])
def test_what_lora_adds_is_its_papers_formula(name: str, folders: dict[str, Path]):
    """W + (alpha / r) B A on the factor as a matrix, whichever way it is turned."""
    plain = opened(folders[name])
    adapted = lora(copy_of := opened(folders[name]), lora_alpha=6)
    learn(adapted, IDS, 3)
    held = dict(copy_of.named_modules())
    changed = 0
    for path, site in plain.named_modules():
        for short, p in list(site.named_parameters(recurse=False)):
            step = held.get(f"{path}.parametrizations.{short}.0")
            if step is None:
                continue
            a, b = (getattr(step.linear, n)["default"].weight for n in ("lora_A", "lora_B"))
            added = 2 * b @ a
            p.data += (added.mT if step.transposed else added).reshape(p.shape).detach()
            changed += 1
    assert changed
    assert (logits(plain) - logits(adapted)).abs().max() < 1e-4


def test_other_adapters_and_dropout_and_checkpointing(folders: dict[str, Path]):
    """The way is open to whatever is linear in its input."""
    for settings in (
        lambda names: peft.LoraConfig(r=2, target_modules=names, use_dora=True),
        lambda names: peft.LoraConfig(r=2, target_modules=names, lora_dropout=0.3),
        lambda names: peft.IA3Config(target_modules=names, feedforward_modules=[]),
    ):
        model = opened(folders["shared-tucker"])
        start = logits(model)
        adapted = peft.get_peft_model(model, settings(tl.factors_as_linears(model)))
        learn(adapted.train(), IDS, 3)
        want = logits(adapted)
        assert (want - start).abs().max() > 1e-4
        assert (logits(adapted.merge_and_unload()) - want).abs().max() < 1e-4


def test_it_may_be_called_twice_and_the_model_trained_and_saved_without_adapters(
    folders: dict[str, Path], tmp_path: Path
):
    model = opened(folders["shared-tucker"])
    start = logits(model)
    names = tl.factors_as_linears(model)
    assert tl.factors_as_linears(model) == names
    assert all(isinstance(model.get_submodule(n), nn.Linear | TransposedLinear) for n in names)
    assert torch.equal(logits(model), start)
    tl.train_only_factors(model)
    learn(model, IDS, 3)
    want = logits(model)
    assert not torch.equal(want, start)
    model.save_pretrained(tmp_path / "tuned")
    assert torch.equal(logits(opened(tmp_path / "tuned")), want)


def test_adapters_that_stand_beside_factors_are_not_lost_in_silence(
    folders: dict[str, Path], tmp_path: Path
):
    adapted = lora(opened(folders["shared-tucker"]))
    with pytest.raises(tl.UserError, match="merge them first"):
        adapted.get_base_model().save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_has_no_factors_that_adapters_could_find_is_one_line(tmp_path: Path):
    with pytest.raises(tl.UserError, match="no factors to adapt"):
        tl.factors_as_linears(tiny_model("llama"))
    wide = tiny_model("llama", hidden_size=64, num_attention_heads=4, intermediate_size=256)
    tl.compress(wide, tl.PerMatrixTucker3D(ranks=(32, 8)))
    tl.save(wide, tmp_path / "wide")
    quantise_folder(tmp_path / "wide", tmp_path / "narrow", "int8")
    with pytest.raises(tl.UserError, match=r"quantised factors of .* take no adapters"):
        tl.factors_as_linears(opened(tmp_path / "narrow"))
