"""Local copies of the hub's repositories: found in each layout, and read as the hub is."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tensorllm.data.repository import files_of_split
from tensorllm.errors import UserError
from tensorllm.evaluation.evaluate import make_dataset
from tensorllm.hub import local_copy

REPO = "EleutherAI/fever"


def claims(*names: str) -> pa.Table:
    return pa.Table.from_pylist([{"claim": name, "label": "SUPPORTS"} for name in names])


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """FEVER as the hub exports it, with another configuration beside it."""
    root = tmp_path / "copy"
    for part, table in {
        "v1.0/paper_dev/0000.parquet": claims("a", "b"),
        "v1.0/paper_dev/0001.parquet": claims("c"),
        "v1.0/paper_test/0000.parquet": claims("d"),
        "v1.0/train/0000.parquet": claims("not these"),
        "v2.0/paper_dev/0000.parquet": claims("nor these"),
    }.items():
        (root / part).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, root / part)
    return root


def prompts(folder: Path) -> list[str]:
    data = make_dataset("fever", data_file=folder, split="all")
    return [e.prompt.split(": ")[1].split(".")[0] for e in data.load()]


def cached(root: Path, copy: Path, revision: str = "abc", ref: str = "main") -> None:
    """The layout of the hub's own cache."""
    place = root / "datasets--EleutherAI--fever"
    shutil.copytree(copy, place / "snapshots" / revision)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / ref).write_text(revision)


@pytest.mark.parametrize("layout", ["itself", "cache", "home", "plain", "short", "other case"])
def test_every_layout_is_read(layout: str, copy: Path, tmp_path: Path):
    root = tmp_path / "root"
    root.mkdir()
    if layout == "itself":
        root = copy
    elif layout in ("cache", "home"):
        cached(root if layout == "cache" else root / "hub", copy)
    else:
        name = {"plain": REPO, "short": "fever", "other case": "eleutherai/FEVER"}[layout]
        shutil.copytree(copy, root / name)
    assert prompts(root) == ["a", "b", "c", "d"]


def test_the_users_own_cache_is_looked_into_first(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cached(tmp_path / "cache", copy)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    data = make_dataset("fever", split="all")
    assert len(data.examples) == 4


def test_a_revision_goes_before_main_and_main_before_others(copy: Path, tmp_path: Path):
    root = tmp_path / "root"
    other = "0" * 39 + "3"  # a commit
    for revision, ref in (("old", "v0"), ("new", "main"), (other, "v2")):
        cached(root, copy, revision, ref)
    assert local_copy(REPO, "dataset", root).name == "new"
    assert local_copy(REPO, "dataset", root, "v0").name == "old"
    assert local_copy(REPO, "dataset", root, other).name == other
    assert local_copy(REPO, "model", root) is None
    assert local_copy("gpt2", "model", tmp_path / "nowhere") is None


def test_a_folder_without_the_split_says_what_should_be_there(tmp_path: Path):
    with pytest.raises(UserError, match=r"no file of v1.0, split paper_dev: .* v1.0/paper_dev"):
        prompts(tmp_path)


def test_splits_are_not_mistaken_for_one_another(tmp_path: Path):
    for name in ("dev-00000-of-00001.parquet", "dev2.jsonl", "paper_dev.jsonl", "dev.jsonl"):
        (tmp_path / name).write_text(json.dumps({"a": 1}))
    names = [path.name for path in files_of_split(tmp_path, None, "dev")]
    assert names == ["dev-00000-of-00001.parquet", "dev.jsonl"]


def test_hotpotqa_takes_as_many_train_rows_as_there_are_others(tmp_path: Path):
    (tmp_path / "fullwiki").mkdir()
    for split, count in (("train", 9), ("validation", 3)):
        rows = [{"question": f"{split}{i}", "answer": "x"} for i in range(count)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"fullwiki/{split}-0.parquet")
    import eval_world as world

    data = make_dataset("hotpotqa", data_file=tmp_path, split="all")
    data.connect(world.tokenizer())
    got = [e.prompt.split("?")[0] for e in data.load()]
    assert got == [f"{s}{i}" for s in ("train", "validation") for i in range(3)]
