"""Attention whose keys and values come from a latent (MLA): each matrix is a role of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tensorllm.calibration.sequences import Calibration
from tensorllm.checkpoint.loading import load
from tensorllm.compression.engine import compress, compress_folder
from tensorllm.compression.task import FolderTask
from tensorllm.compressors.settings import make_compressor
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.models.shrink import shrunk

TYPES = ("deepseek_v3", "minicpm3", "glm4_moe_lite")
MATRICES = ("q_a", "q_b", "kv_a", "kv_b", "o")
IDS = torch.tensor([[7, 41, 19, 78, 5, 63]])


def latent_model(model_type: str, **given: Any) -> Any:
    torch.manual_seed(0)
    config = shrunk(AutoConfig.for_model(model_type, **given), 2)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def text() -> Calibration:
    draws = torch.Generator().manual_seed(3)
    drawn = torch.randint(3, 80, (24, 16), generator=draws).tolist()
    return Calibration(tuple(map(tuple, drawn)))


@pytest.mark.parametrize("model_type", TYPES)
def test_each_matrix_is_a_role_and_its_product_is_the_modules(model_type: str) -> None:
    model = latent_model(model_type)
    weights = parameters_of(model)
    roles = RoleMatrices(model.config, weights)
    assert set(MATRICES) <= set(roles.spec.geometry(0).roles)
    for role in MATRICES:
        w = roles.read(weights, 0, role)
        stored = weights[roles.name(0, role)]
        assert torch.equal(w, stored.T if role == "o" else stored)


@pytest.mark.parametrize("mode", ["svd", "laser"])
@pytest.mark.parametrize("model_type", TYPES)
def test_memory_and_folder_and_factors_agree(model_type: str, mode: str, tmp_path: Path) -> None:
    model = latent_model(model_type)
    model.save_pretrained(tmp_path / "model")
    strategy = make_compressor(mode, {"rank": 6, "matrices": MATRICES})
    dense = compress_folder(
        FolderTask(source=tmp_path / "model", target=tmp_path / "dense", compressor=strategy)
    )
    compress_folder(
        FolderTask(
            source=tmp_path / "model",
            target=tmp_path / "factored",
            compressor=strategy,
            format="factored",
        )
    )
    with torch.no_grad():
        before = model(IDS).logits
        report = compress(model, strategy)
        want = model(IDS).logits
        assert not torch.allclose(want, before, atol=1e-6)
        for loaded in (
            AutoModelForCausalLM.from_pretrained(tmp_path / "dense"),
            load(tmp_path / "factored", policy="always"),
        ):
            torch.testing.assert_close(loaded.eval()(IDS).logits, want, rtol=1e-4, atol=1e-5)
    assert len(report.sites) == len(dense.sites) == 2 * len(MATRICES)
    kept = {tuple(site.roles): site.ranks for site in report.sites}
    assert kept["kv_b",] == (6,)


@pytest.mark.parametrize("mode", ["asvd", "svd-llm", "activation-tucker"])
def test_modes_fitted_to_text_work(mode: str) -> None:
    model = latent_model("minicpm3")
    settings = {"target_ratio": 4.0} if mode == "activation-tucker" else {"kept": 0.4}
    report = compress(model, make_compressor(mode, settings), calibration=text())
    assert {role for site in report.sites for role in site.roles} >= set(MATRICES)
    with torch.no_grad():
        assert torch.isfinite(model(IDS).logits).all()


def test_at_full_rank_nothing_changes() -> None:
    model = latent_model("deepseek_v3")
    with torch.no_grad():
        before = model(IDS).logits
        compress(model, make_compressor("laser", {"rho": 1.0, "matrices": MATRICES}))
        torch.testing.assert_close(model(IDS).logits, before, rtol=1e-3, atol=1e-5)


def test_shared_tucker_says_why_not() -> None:
    model = latent_model("deepseek_v3")
    with pytest.raises(UserError, match=r"no matrix q, k, v .*latent \(MLA\).*svd, laser"):
        compress(model, make_compressor("shared-tucker", {"ranks": (4, 4, 2)}))
