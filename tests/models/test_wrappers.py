"""Wrappers around a text model: the text model is compressed, everything else stays byte for byte.

Tiny random ones, whose configs are shrunk from the defaults of their classes.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from typer.testing import CliRunner

from tensorllm.calibration.sequences import Calibration
from tensorllm.checkpoint.reader import Checkpoint
from tensorllm.compression.engine import compress_folder
from tensorllm.compression.task import FolderTask
from tensorllm.compressors.settings import make_compressor
from tensorllm.data.demo import MODEL_DIR
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices
from tensorllm.models.shrink import shrunk
from tensorllm_cli.app import app

WRAPPERS = (
    "gemma3",
    "llava",
    "qwen2_5_vl",
    "qwen3_vl",
    "mistral3",
    "llama4",
    "idefics3",
    "internvl",
)

Bytes = dict[str, bytes]
runner = CliRunner()


@cache
def config_of(model_type: str) -> Any:
    torch.manual_seed(0)
    return shrunk(AutoConfig.for_model(model_type), 2)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("wrappers")

    @cache
    def made(model_type: str) -> Path:
        torch.manual_seed(1)
        model = AutoModelForImageTextToText.from_config(config_of(model_type)).eval()
        for p in model.parameters():
            if not p.any():  # a projector that is trained from zero on would hide the image
                p.data.normal_(std=0.2)
        folder = root / model_type
        model.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text("{}")
        (folder / "processor_config.json").write_text("{}")
        return folder

    return made


def compressed(folder: Path, target: Path, **given: Any) -> Path:
    mode = make_compressor("shared-tucker", {"ranks": (16, 8, 4)})
    compress_folder(FolderTask(source=folder, target=target, compressor=mode, **given))
    return target


def tensors(folder: Path) -> Bytes:
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                t = opened.get_tensor(name).contiguous()
                out[name] = (
                    t.view(torch.uint8).numpy().tobytes() if t.ndim else bytes(str(t), "utf")
                )
    return out


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_only_the_text_models_matrices_change(
    folder_of: Any, model_type: str, tmp_path: Path
) -> None:
    source = folder_of(model_type)
    before, after = tensors(source), tensors(compressed(source, tmp_path / "out"))
    changed = {name for name in before if before[name] != after[name]}
    checkpoint = Checkpoint(source)
    roles = RoleMatrices(checkpoint.config, checkpoint.entries)
    want = {roles.name(n, role) for n in roles.spec.having(("q", "k", "v", "o")) for role in "qkvo"}
    assert before.keys() == after.keys()
    assert changed == want
    assert not any("vision" in name or "visual" in name for name in changed)
    assert (tmp_path / "out" / "processor_config.json").is_file()
    text = torch.tensor([[7, 41, 19, 78]])
    for folder in (source, tmp_path / "out"):
        model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        assert model.generate(text, max_new_tokens=2, min_new_tokens=2, do_sample=False).shape == (
            1,
            6,
        )


def with_image(model: Any) -> dict[str, Any]:
    """A text with an image, as the model's processor would make it."""
    config, vision = model.config, model.config.vision_config
    name = "image_token_id" if hasattr(config, "image_token_id") else "image_token_index"
    token = getattr(config, name)
    draws = torch.Generator().manual_seed(0)
    if hasattr(vision, "spatial_merge_size"):  # Qwen: patches of any grid
        grid = torch.tensor([[1, 4, 4]])
        depth = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.randn(16, depth, generator=draws)
        count = 16 // vision.spatial_merge_size**2
        extra = {"image_grid_thw": grid}
    else:
        pixels = torch.randn(1, 3, vision.image_size, vision.image_size, generator=draws)
        features = model.get_image_features(pixel_values=pixels)
        found = getattr(features, "pooler_output", features)
        count = sum(len(each.flatten(0, -2)) for each in found)
        extra = {}
    ids = torch.tensor([[7, 41, *[token] * count, 19, 78]])
    kinds = (ids == token).int()
    if "mm_token_type_ids" in type(model).forward.__code__.co_varnames or hasattr(
        vision, "spatial_merge_size"
    ):
        extra["mm_token_type_ids"] = kinds
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        **extra,
    }


@pytest.mark.parametrize("model_type", ["llava", "gemma3", "qwen2_5_vl"])
def test_an_image_and_a_text_are_answered_before_and_after(
    folder_of: Any, model_type: str, tmp_path: Path
) -> None:
    source = folder_of(model_type)
    target = compressed(source, tmp_path / "out")
    logits = []
    for folder in (source, target):
        model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        given = with_image(model)
        made = model.generate(**given, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        assert made.shape[1] == given["input_ids"].shape[1] + 2
        with torch.no_grad():
            logits.append(model(**given).logits)
            other = model(**{**given, "pixel_values": 2 * given["pixel_values"] + 1}).logits
        assert not torch.equal(other, logits[-1])  # the image is looked at
    assert not torch.equal(*logits)


OLD = {  # as versions before 4.52 of transformers named them
    "llava": ("model.language_model.", "language_model.model."),
    "qwen2_5_vl": ("model.language_model.", "model."),
}


@pytest.mark.parametrize("model_type", OLD)
def test_names_of_older_versions_lead_to_the_same_matrices(
    folder_of: Any, model_type: str, tmp_path: Path
) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder_of(model_type))
    own = {name: p.data for name, p in model.named_parameters()}
    new, old = OLD[model_type]
    if model_type == "llava":
        renames = [
            (new, old),
            ("model.vision_tower.", "vision_tower."),
            ("lm_head.", "language_model.lm_head."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
        ]
    else:
        renames = [(new, old), ("model.visual.", "visual.")]

    def renamed(name: str) -> str:
        for one, other in renames:
            if name.startswith(one):
                return other + name.removeprefix(one)
        return name

    older, newer = ({f(n): tuple(w.shape) for n, w in own.items()} for f in (renamed, str))
    for names in (older, newer):
        roles = RoleMatrices(model.config, names)
        for layer in range(roles.layers):
            path = f"{new}layers.{layer}.self_attn.q_proj.weight"
            want = path if names is newer else renamed(path)
            assert roles.name(layer, "q") == want
    folder = tmp_path / "old"
    model.config.save_pretrained(folder)
    save_file(
        {renamed(n): w.contiguous() for n, w in own.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    after = load_file(compressed(folder, tmp_path / "out") / "model.safetensors")
    assert set(after) == set(older)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    changed = [n for n, p in again.named_parameters() if not torch.equal(p.data, own[n])]
    assert changed
    assert all(".self_attn." in name and name.startswith(new) for name in changed)


def test_a_wrapper_without_a_text_config_is_refused(folder_of: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in folder_of("llava").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    values = json.loads((folder / "config.json").read_text())
    values["text_config"] = None
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="text_config"):
        compressed(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl"])
def test_a_fit_to_text_in_memory_and_layer_by_layer_is_the_same(
    folder_of: Any, model_type: str, tmp_path: Path
) -> None:
    """Only the text model runs; what the wrapper hands its layers is understood."""
    drawn = torch.randint(3, 80, (16, 16), generator=torch.Generator().manual_seed(3)).tolist()
    text = Calibration(tuple(map(tuple, drawn)))
    mode = make_compressor("activation-tucker", {"target_ratio": 1.6})
    weights = []
    for stream in (False, True):
        target = tmp_path / f"stream-{stream}"
        compress_folder(
            FolderTask(
                source=folder_of(model_type),
                target=target,
                compressor=mode,
                calibration=text,
                stream=stream,
            )
        )
        weights.append(load_file(target / "model.safetensors"))
    for name, w in weights[0].items():
        torch.testing.assert_close(weights[1][name], w, rtol=1e-3, atol=1e-4)


def test_commands_take_a_wrapper_as_they_take_any_model(tmp_path: Path) -> None:
    """Evaluated, searched and fitted to text whose sequences its text model must not exceed."""
    config = shrunk(AutoConfig.for_model("gemma3"), 2)
    config.text_config.vocab_size = 600
    config.text_config.max_position_embeddings = 96
    torch.manual_seed(2)
    folder, fitted = tmp_path / "model", tmp_path / "fitted"
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(folder)
    (tmp_path / "text.txt").write_text("\n\n".join(f"Anna lives in town {n}." for n in range(400)))
    text = ("--calibration", tmp_path / "text.txt", "--sequences", 12)
    scored = ("--dataset", "demo", "--limit", 20)
    for given in (
        ("compress", "--model", folder, "--mode", "svd-llm", "--set", "kept=0.7", *text,
         "--out", fitted),
        ("evaluate", "--model", folder, "--compressed", fitted, *scored, "--out", tmp_path / "e"),
        ("search-ranks", "--model", folder, *scored, "--mode", "laser", "--rho", "0.2,0.6",
         "--trials", 2, "--study", tmp_path / "s"),
    ):  # fmt: skip
        done = runner.invoke(app, list(map(str, given)))
        assert done.exit_code == 0, done.output
