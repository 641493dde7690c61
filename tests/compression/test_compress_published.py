"""The authors' layout gives their weights, and the published compression ratios come out.

Shapes: D model width, K head width, H heads.
"""

import json
import struct
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorly
import torch
import yaml
from repository import ROOT
from tensorly.decomposition import partial_tucker
from tiny_models import tiny_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

import tensorllm as tl
from tensorllm.compression.dry_run import dry_run
from tensorllm.compression.task import FolderTask
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.tensors.stacking import ATTENTION

CELLS = yaml.safe_load((ROOT / "configs" / "published.yaml").read_text())["tensorllm"]["cells"]
UNGROUPED = {  # llama's tiny row is grouped; the papers' LLaMA-2 7B is not
    "gptj": {},
    "llama": {"num_key_value_heads": 4},
    "roberta": {},
}


def chunks(w_OI: np.ndarray, heads: int) -> np.ndarray:
    """The authors' view of a stored `nn.Linear` weight: (out, heads, in / heads)."""
    return w_OI.reshape(w_OI.shape[0], heads, w_OI.shape[1] // heads)


def truncated(w: np.ndarray, ranks: tuple[int, ...], modes: list[int]) -> np.ndarray:
    (core, factors), _ = partial_tucker(w, list(ranks), modes=modes, init="svd", tol=1e-5)
    return tensorly.tenalg.multi_mode_dot(core, factors, modes=modes)


def authors_all(stored: dict[str, np.ndarray], ranks: tuple[int, ...], heads: int) -> Any:
    """Q, K, V and the transposed O, viewed, stacked last; modes 0, 2, 3: not the heads."""
    wide = {role: w.T if role == "o" else w for role, w in stored.items()}
    tensor = np.stack([chunks(wide[role], heads) for role in ATTENTION], axis=3)
    out = truncated(tensor, ranks, [0, 2, 3])
    matrices = {role: out[..., i].reshape(wide[role].shape) for i, role in enumerate(ATTENTION)}
    return {role: w.T if role == "o" else w for role, w in matrices.items()}


def authors_each(stored: dict[str, np.ndarray], ranks: tuple[int, ...], heads: int) -> Any:
    out = {}
    for role, w in stored.items():
        turned = w.T if role == "o" else w
        low = truncated(chunks(turned, heads), ranks, [0, 2]).reshape(turned.shape)
        out[role] = low.T if role == "o" else low
    return out


@pytest.mark.parametrize("name", UNGROUPED)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per matrix"])
def test_official_layout_is_the_authors_algorithm(name: str, shared: bool) -> None:
    """On planted low-rank weights plus noise, to 1e-4 of their norm."""
    model = tiny_model(name, **UNGROUPED[name])
    weights = parameters_of(model)
    roles = RoleMatrices(model.config, weights)
    geo, ranks = roles.spec.geometry(0), (10, 5, 3) if shared else (10, 5)
    noise = np.random.default_rng(0)
    plain = {role: weights[roles.name(1, role)] for role in ATTENTION}
    random = {role: noise.standard_normal(w.shape) for role, w in plain.items()}
    authors = authors_all if shared else authors_each
    planted = authors(random, ranks, geo.H)
    for role, w in planted.items():
        w = w + 0.02 * w.std() * noise.standard_normal(w.shape)
        plain[role].copy_(torch.from_numpy(w))
    want = authors({role: w.double().numpy() for role, w in plain.items()}, ranks, geo.H)
    kind = tl.SharedTucker4D if shared else tl.PerMatrixTucker3D
    tl.compress(model, kind(ranks=ranks, layout="official"), layers=[1])
    for role, w in plain.items():
        error = np.linalg.norm(w.double().numpy() - want[role]) / np.linalg.norm(want[role])
        assert error < 1e-4, (role, error)
        assert np.linalg.norm(planted[role] - want[role]) > 1e-4 * np.linalg.norm(want[role])


def empty_checkpoint(folder: Path, model: str) -> Path:
    """A checkpoint of a real model's shapes whose file has a header and a hole for the numbers."""
    sizes = yaml.safe_load((ROOT / "configs" / "models.yaml").read_text())[model]
    shape = sizes["sizes"]
    config = AutoConfig.for_model(
        sizes["model_type"],
        hidden_size=shape["hidden"],
        num_attention_heads=shape["heads"],
        num_hidden_layers=shape["layers"],
        **({} if model == "gptj" else {"intermediate_size": shape["ffn"]}),
    )
    auto = AutoModelForMaskedLM if model == "roberta" else AutoModelForCausalLM
    with torch.device("meta"):
        made = auto.from_config(config)
    config.architectures = [type(made).__name__]
    config.save_pretrained(folder)
    header, end = {}, 0
    for name, p in made.named_parameters():
        start, end = end, end + 2 * p.numel()
        header[name] = {"dtype": "F16", "shape": list(p.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return folder


@pytest.fixture(scope="module")
def real_shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("real")
    return {model: empty_checkpoint(root / model, model) for model in ("gptj", "llama2", "roberta")}


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell['model']}-{cell['dataset']}")
@pytest.mark.parametrize("layout", ["paper", "official"])
def test_published_ratios(cell: dict[str, Any], layout: Any, real_shapes: dict[str, Path]) -> None:
    """Of one layer's attention in the real model, told before any work, to the digits published."""
    published = cell["shared_tucker"]["cr"]
    digits = len(str(published).partition(".")[2])
    for ranks in cell["ranks"]:
        compressor = tl.SharedTucker4D(ranks=tuple(ranks), layout=layout)
        task = FolderTask(
            source=real_shapes[cell["model"]], target=Path(), compressor=compressor, layers=[5]
        )
        plan = dry_run(task).to_json()
        assert round(plan["sites"][0]["compression_ratio"], digits) == published
        saved = plan["sites"][0]["parameters_before"] - plan["sites"][0]["parameters_after"]
        assert plan["parameters_before"] - plan["parameters_after"] == saved


def test_there_are_twelve_cells() -> None:
    models, datasets = zip(*((cell["model"], cell["dataset"]) for cell in CELLS), strict=True)
    assert len(CELLS) == len(set(zip(models, datasets, strict=True))) == 12
    assert len(set(product(models, datasets))) == 12


def test_each_ratio_by_its_name() -> None:
    """Against counts made here by hand."""
    model = tiny_model("gptj")
    whole = sum(p.numel() for p in model.parameters())
    report = tl.compress(model, tl.Hybrid(ranks=(12, 5, 3), rho=0.25, ffn_layers=(0,)), layers=[1])
    attention, left = 4 * 32 * 32, 12 * 5 * 3 * 4 + 32 * 12 + 8 * 5 + 4 * 3
    ffn, ffn_left = 56 * 32, 8 * (56 + 32)
    ratios = report.ratios()
    assert ratios["matrices_compressed"] == pytest.approx((attention + ffn) / (left + ffn_left))
    assert ratios["attention_of_edited_layers"] == pytest.approx(attention / left)
    assert ratios["all_attention"] == pytest.approx(2 * attention / (left + attention))
    saved = attention + ffn - left - ffn_left
    assert ratios["whole_model"] == pytest.approx(whole / (whole - saved))
    assert json.loads(json.dumps(report.to_json()))["ratios"] == ratios


def test_official_and_paper_layouts_differ() -> None:
    weights: list[Tensor] = []
    for layout in ("paper", "official"):
        model = tiny_model("gptj")
        tl.compress(model, tl.SharedTucker4D(ranks=(10, 5, 3), layout=layout), layers=[1])
        weights.append(model.transformer.h[1].attn.q_proj.weight)
    assert (weights[0] - weights[1]).norm() > 0.1 * weights[0].norm()
