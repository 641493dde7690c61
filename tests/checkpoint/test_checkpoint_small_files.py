"""All that lies beside weights goes with the model, but code, pickles and other weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_model

from tensorllm.checkpoint.small_files import small_files
from tensorllm.compression.engine import compress_folder
from tensorllm.compression.export import export
from tensorllm.compression.task import FolderTask
from tensorllm.compressors.laser import LaserSVD

KEPT = (
    "bpe.codes",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool.jinja",
    "vocab.txt",
    "tokenizer.model",
    "merges.bpe",
    "LICENSE",
    "NOTICE.txt",
    "modules.json",
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
)
LEFT = (
    "modeling_x.py",
    "training_args.bin",
    "optimizer.pt",
    "pytorch_model.bin.index.json",
    "flax_model.msgpack",
    "tf_model.h5",
    "model.gguf",
    "adapter_model.safetensors",
    ".gitattributes",
    "2_Dense/pytorch_model.bin",
    "2_Dense/code.py",
    "onnx/model.onnx",
    "onnx/config.json",
    "checkpoint-5/model.safetensors",
    "checkpoint-5/trainer_state.json",
    ".cache/x.json",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    tiny_model("llama").save_pretrained(folder)
    for name in KEPT + LEFT:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    save_file({"linear.weight": torch.ones(2, 2)}, folder / "2_Dense" / "model.safetensors")
    return folder


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_what_is_copied(folder: Path) -> None:
    found = {path.relative_to(folder).as_posix() for path in small_files(folder)}
    assert found == {*KEPT, "config.json", "generation_config.json"}


@pytest.mark.parametrize("format", ["dense", "factored"])
def test_compressed_and_exported_folders_have_it_all(
    folder: Path, tmp_path: Path, format: str
) -> None:
    out = tmp_path / "out"
    task = FolderTask(
        source=folder,
        target=out,
        compressor=LaserSVD(rho=0.5),
        format=format,  # type: ignore[arg-type]
    )
    compress_folder(task)
    assert set(KEPT) <= names(out)
    assert not set(LEFT) & names(out)
    if format == "factored":
        export(out, tmp_path / "dense")
        assert set(KEPT) <= names(tmp_path / "dense")


def test_a_large_folder_without_weights_is_no_part_of_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "wandb").mkdir()
    (folder / "wandb" / "log.json").write_text("x" * 100)
    monkeypatch.setattr("tensorllm.checkpoint.small_files.SMALL", 99)
    assert not [path for path in small_files(folder) if path.parent.name == "wandb"]
