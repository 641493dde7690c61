"""A model is what its files hold: neither its path nor the day it was copied."""

import json
import os
import shutil
from pathlib import Path

import eval_world as world
import pytest
import torch
from tiny_models import tiny_model

from tensorllm.checkpoint.loader import Loader
from tensorllm.checkpoint.reader import Checkpoint
from tensorllm.commands.evaluate import evaluate
from tensorllm.compression.engine import compress_folder
from tensorllm.compression.task import FolderTask
from tensorllm.compressors.laser import LaserSVD
from tensorllm.errors import UserError
from tensorllm.reproduction.inputs import data_identity
from tensorllm.requests.evaluate import EvaluateRequest

ROW = '{"prompt": "a", "answer": "b"}\n'


def saved(folder: Path, seed: int = 0, **sizes: str) -> Path:
    tiny_model("llama", seed=seed).save_pretrained(folder, **sizes)
    return folder


def test_a_copy_is_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = saved(tmp_path / "a")
    shutil.copytree(first, tmp_path / "b" / "c", copy_function=shutil.copyfile)
    os.utime(tmp_path / "b" / "c" / "model.safetensors", (1, 1))
    monkeypatch.chdir(tmp_path)
    for other in (tmp_path / "b" / "c", Path("a")):
        assert Checkpoint(other).identity == Checkpoint(first).identity
        assert Checkpoint(other).fingerprint() == Checkpoint(first).fingerprint()
        assert Loader(other).fingerprint() == Loader(first).fingerprint()


def test_how_it_is_cut_into_files_does_not_matter(tmp_path: Path) -> None:
    whole, sharded = saved(tmp_path / "a"), saved(tmp_path / "b", max_shard_size="20KB")
    assert len({entry.file for entry in Checkpoint(sharded).entries.values()}) > 1
    assert Checkpoint(whole).identity == Checkpoint(sharded).identity


def test_other_weights_are_another_model(tmp_path: Path) -> None:
    assert Checkpoint(saved(tmp_path / "a")).identity != (
        Checkpoint(saved(tmp_path / "b", seed=1)).identity
    )


def test_another_config_is_another_model(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    before = Checkpoint(folder).identity
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"_name_or_path": "elsewhere"}))
    assert Checkpoint(folder).identity == before
    path.write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert Checkpoint(folder).identity != before


def test_one_trained_layer_is_another_model(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight += 1e-3
    model.save_pretrained(tmp_path / "b")
    assert Checkpoint(tmp_path / "a").identity != Checkpoint(tmp_path / "b").identity


def test_a_compressed_folder_knows_its_model_wherever_that_is(tmp_path: Path) -> None:
    original = world.save_model(tmp_path / "one")
    small = tmp_path / "small"
    compress_folder(
        FolderTask(source=original, target=small, compressor=LaserSVD(rho=0.5), layers=(0,))
    )
    moved = original.rename(tmp_path / "two")
    (tmp_path / "q.jsonl").write_text(ROW)

    def asked(model: Path) -> EvaluateRequest:
        return EvaluateRequest(
            model=str(model),
            dataset="questions",
            data_file=tmp_path / "q.jsonl",
            split="all",
            compressed=small,
        )

    assert evaluate(asked(moved)).before is not None
    other = world.save_model(tmp_path / "one")  # the old path, but another model
    path = other / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_norm_epsilon": 0.1}))
    with pytest.raises(UserError, match="was made from"):
        evaluate(asked(other))


def test_rows_are_known_by_their_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "fever.jsonl").write_text(ROW)
    assert data_identity("fever", tmp_path / "a") == data_identity("fever", tmp_path / "b")
    (tmp_path / "b" / "fever.jsonl").write_text(ROW * 2)
    assert data_identity("fever", tmp_path / "a") != data_identity("fever", tmp_path / "b")
    assert data_identity("fever", tmp_path / "none") is None
