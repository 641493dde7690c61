"""Folders: what is saved is what was in memory, for every architecture; sizes, shards, resuming."""

import fcntl
import json
import os
import random
import resource
import shutil
import signal
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from naive_layer import TOKENS
from safetensors.torch import load_file
from tiny_models import TINY, tiny_model
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

import tensorllm as tl
from tensorllm.checkpoint.convert import main as convert
from tensorllm.checkpoint.factored import dense_tensors
from tensorllm.checkpoint.loader import Loader
from tensorllm.checkpoint.writer import ShardWriter, exclusive
from tensorllm.compression.engine import compress_folder
from tensorllm.compression.export import export, quantise_folder
from tensorllm.compression.task import FolderTask
from tensorllm.errors import Incomplete, UserError

HYBRID = tl.Hybrid(ranks=(12, 5, 3), rho=0.25)
QUERIES = tl.PerMatrixTucker3D(ranks=(6, 5), matrices=("q",))  # leaves k and v of fused ones alone
every_model = pytest.mark.parametrize("name", TINY)
every_format = pytest.mark.parametrize("format", ["dense", "factored"])


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(TOKENS)[0]


def assert_same(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """The same parameters, bit for bit; the same logits, but for how each computes attention."""
    assert model.config.model_type == other.config.model_type
    state, wanted = model.state_dict(), other.state_dict()
    assert state.keys() == wanted.keys()
    for name, w in wanted.items():
        assert state[name].dtype == w.dtype, name
        assert torch.equal(state[name], w), name
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.1
    torch.testing.assert_close(logits(model), logits(other), rtol=tolerance, atol=tolerance)


def weights_of(folder: Path, format: str = "dense") -> dict[str, Tensor]:
    """All parameters of a folder, whatever its format and number of files."""
    if format == "factored":
        return dict(dense_tensors(folder))
    return {
        k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()
    }


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the report, which tells seconds."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "report.json"}


@every_format
@every_model
@pytest.mark.parametrize("compressor", [HYBRID, QUERIES], ids=["hybrid", "queries"])
def test_save_and_load(compressor: tl.Compressor, name: str, format: Any, tmp_path: Path) -> None:
    model = tiny_model(name)
    tl.compress(model, compressor, layers=[1])
    tl.save(model, tmp_path / "out", format=format)
    assert_same(tl.load(tmp_path / "out"), model)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@every_format
@pytest.mark.parametrize("name", ["gpt2", "phi3", "gemma2", "bert"])
def test_half_precision_and_tied_embeddings(name: str, format: Any, tmp_path: Path) -> None:
    model = tiny_model(name, tie_word_embeddings=True).to(torch.bfloat16)
    tl.compress(model, HYBRID)
    tl.save(model, tmp_path / "out", format=format)
    again = tl.load(tmp_path / "out")
    assert_same(again, model)
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight


@every_format
@every_model
def test_folder_and_memory_agree_bit_for_bit(name: str, format: Any, tmp_path: Path) -> None:
    """Several shards in, several shards out."""
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 2
    task = FolderTask(
        source=tmp_path / "in",
        target=tmp_path / "out",
        compressor=HYBRID,
        format=format,
        shard_bytes=15_000,
    )
    on_disk = compress_folder(task)
    in_memory = tl.compress(model, HYBRID)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert_same(tl.load(tmp_path / "out"), model)
    for one, other in zip(on_disk.sites, in_memory.sites, strict=True):
        for fact in ("name", "ranks", "parameters_after", "relative_error"):
            assert getattr(one, fact) == getattr(other, fact)


@every_format
def test_dtype_of_what_is_written(format: Any, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "in")
    task = FolderTask(
        source=tmp_path / "in",
        target=tmp_path / "out",
        compressor=HYBRID,
        format=format,
        dtype=torch.bfloat16,
    )
    report = compress_folder(task)
    assert report.dtype == "bfloat16"
    stored = weights_of(tmp_path / "out")
    assert {w.dtype for w in stored.values()} == {torch.bfloat16}
    model = tl.load(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert tl.load(tmp_path / "out", dtype=torch.float32).dtype == torch.float32
    want = tiny_model("llama")
    tl.compress(want, HYBRID)
    error = (logits(model) - logits(want)).norm() / logits(want).norm()
    assert error < 0.05


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that headers do not count."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    sizes = {"hidden_size": 256, "num_attention_heads": 8, "n_inner": 512}
    model = tiny_model("gptj", **sizes)
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=1)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_mine.py").write_text("raise SystemExit")
    return folder


@every_format
def test_sizes_on_disk_are_those_of_the_report(wide: Path, format: Any, tmp_path: Path) -> None:
    compressor = tl.Hybrid(ranks=(24, 8, 2), rho=0.05, matrices=("in", "out"))
    task = FolderTask(source=wide, target=tmp_path / "out", compressor=compressor, format=format)
    report = compress_folder(task)
    files = [p for p in (tmp_path / "out").iterdir() if p.suffix == ".safetensors"]
    before = (wide / "model.safetensors").stat().st_size
    real = before / sum(path.stat().st_size for path in files)
    ratios = report.ratios()
    assert ratios["bytes_on_disk"] == pytest.approx(real, rel=0.01)
    told = ratios["whole_model"] if format == "factored" else 1.0
    assert real == pytest.approx(told, rel=0.01)
    assert ratios["whole_model"] > 5
    stored = sum(w.numel() for w in weights_of(tmp_path / "out").values())
    told_after = report.totals.parameters_after
    assert stored == (told_after if format == "factored" else report.totals.parameters_before)


@every_format
def test_what_comes_along(wide: Path, format: Any, tmp_path: Path) -> None:
    """Tokenizer and generation config, but no code; the same rights as other files."""
    out = tmp_path / "out"
    compress_folder(FolderTask(source=wide, target=out, compressor=HYBRID, format=format))
    assert (out / "tokenizer.json").read_text() == "{}"
    assert tl.load(out).generation_config.max_new_tokens == 7
    assert not (out / "modeling_mine.py").exists()
    modes = {path.stat().st_mode & 0o777 for path in out.iterdir()}
    assert len(modes) == 1
    manifest = json.loads((out / "tensorllm.json").read_text())
    assert (manifest["mode"], manifest["settings"]["ranks"]) == ("hybrid", [12, 5, 3])
    assert manifest["source"]["model"] == str(wide)
    report = json.loads((out / "report.json").read_text())
    assert [site["name"] for site in report["sites"]][:2] == ["layers.0.qkvo", "layers.1.qkvo"]


@pytest.mark.slow
def test_plain_transformers_loads_a_dense_folder(tmp_path: Path) -> None:
    """In a Python that cannot import tensorllm, with the same logits."""
    for name in ("gpt2", "llama", "roberta"):
        model = tiny_model(name)
        tl.compress(model, HYBRID)
        tl.save(model, tmp_path / name, format="dense")
        torch.save(logits(model), tmp_path / f"{name}.pt")
    code = """
import sys, torch
sys.modules["tensorllm"] = None
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
for name in ("gpt2", "llama", "roberta"):
    auto = AutoModelForMaskedLM if name == "roberta" else AutoModelForCausalLM
    model = auto.from_pretrained(name, attn_implementation="eager").eval()
    with torch.no_grad():
        got = model(torch.tensor([[7, 41, 19, 88, 5, 63]]))[0]
    assert torch.equal(got, torch.load(f"{name}.pt")), name
print("the same")
"""
    done = forked.run(["-c", code], cwd=tmp_path, bare=True)
    assert done.stdout == "the same\n", done.stderr


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    model = tiny_model("gptj")
    tl.compress(model, HYBRID)
    tl.save(model, tmp_path / "out")
    path = tmp_path / "out" / "factored.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    tl.load(tmp_path / "out")  # as fast as transformers: only sizes are looked at
    with pytest.raises(tl.UserError, match="checksum"):
        tl.load(tmp_path / "out", verify=True)
    with pytest.raises(tl.UserError, match="checksum"):
        Loader(tmp_path / "out", verify=True)()
    path.write_bytes(data[:-1])
    with pytest.raises(tl.UserError, match="truncated"):
        tl.load(tmp_path / "out")


@every_format
def test_weights_trained_after_compression_are_not_lost(format: Any, tmp_path: Path) -> None:
    model = tiny_model("gptj")
    tl.compress(model, HYBRID)
    with torch.no_grad():
        model.transformer.h[1].attn.v_proj.weight[3, 4] += 0.5
    with pytest.raises(tl.UserError, match=r"h.1.attn.v_proj.weight has changed"):
        tl.save(model, tmp_path / "out", format=format)
    assert not list(tmp_path.iterdir())


def test_overwrite_replaces_the_whole_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    (tmp_path / "out" / "config.json").write_text('{"model_type": "gptj"}')
    model = tiny_model("gptj")
    tl.compress(model, HYBRID)
    with pytest.raises(tl.UserError, match="exists; give --overwrite"):
        tl.save(model, tmp_path / "out")
    tl.save(model, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "old.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_pickled_weights_are_converted_and_no_code_runs(tmp_path: Path) -> None:
    model = tiny_model("gptj")
    model.save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    torch.save(Path(), tmp_path / "old" / "training_args.bin")  # no weights: a trainer's own
    assert convert([str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    assert_same(type(model).from_pretrained(tmp_path / "new"), model)

    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"w": Evil()}, tmp_path / "old" / "pytorch_model.bin")
    assert convert([str(tmp_path / "old"), str(tmp_path / "other")]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"old", "new"}


def test_a_resumed_run_writes_nothing_twice(tmp_path: Path) -> None:
    """Not even where all is computed again, as it is when factors are quantised."""
    for killed in (True, False):
        new = ShardWriter(tmp_path / "out", stem="model", fingerprint={}, shard_bytes=8)
        with suppress(KeyboardInterrupt), new as writer:
            for name in "ab":
                writer.add(name, {name: torch.ones(2)})
            if killed:
                raise KeyboardInterrupt
            assert writer.name_files() == "model.safetensors.index.json"
    assert sorted(path.name for path in writer.folder.glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_what_is_refused_is_thrown_away(tmp_path: Path) -> None:
    new = ShardWriter(tmp_path / "out", stem="model", fingerprint={}, shard_bytes=8)
    with suppress(UserError), new as writer:
        writer.add("a", {"a": torch.ones(2)})
        raise UserError("wrong weights, met on the way")
    assert not list(tmp_path.iterdir())


def test_one_run_at_a_time_writes_a_folder(tmp_path: Path) -> None:
    model = tiny_model("gptj")
    tl.compress(model, HYBRID)
    tl.save(model, tmp_path / "small")
    with exclusive(tmp_path / "out"):
        for write in (export, partial(quantise_folder, how="int8")):
            with pytest.raises(tl.UserError, match="another run is writing"):
                write(tmp_path / "small", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"small"}


def test_a_lock_deleted_by_the_run_that_held_it_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / ".out.lock"
    monkeypatch.setattr(fcntl, "flock", lambda file, how: lock.unlink())
    with pytest.raises(tl.UserError, match="another run is writing"), exclusive(tmp_path / "out"):
        pass


@pytest.mark.parametrize("target", [Path("/proc/x"), Path("/proc/x/y")])
def test_a_place_where_no_file_can_be_made_is_said(target: Path) -> None:
    said = f"cannot write to {target.parent}: No such file"
    with pytest.raises(tl.UserError, match=said), exclusive(target):
        pass


def task_for(folder: Path, target: Path) -> FolderTask:
    return FolderTask(
        source=folder, target=target, compressor=HYBRID, format="factored", shard_bytes=60_000
    )


def run_slowly(folder: Path, target: Path, started: Any) -> None:
    """In a process of its own: a pause at each unit spreads the moments of death."""

    def progress(done: int, total: int, what: str) -> None:
        started.set()
        time.sleep(0.01)

    torch.set_num_threads(1)
    compress_folder(task_for(folder, target), progress)


def fill_the_disk(folder: Path, target: Path, told: Any) -> None:
    """In a process of its own, whose files may not grow half-way through the work."""

    def progress(done: int, total: int, what: str) -> None:
        if done > total / 2:
            while not journal_of(target):  # the first half's shards are being entered
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    torch.set_num_threads(1)
    try:
        compress_folder(task_for(folder, target), progress)
    except Incomplete as error:
        told.put(str(error))


@pytest.fixture(scope="module")
def processes() -> Any:
    return forked.context()


@pytest.fixture(scope="module")
def undisturbed(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("undisturbed") / "out"
    compress_folder(task_for(wide, target))
    return target


def journal_of(target: Path) -> list[dict[str, Any]]:
    path = target.parent / f".{target.name}.partial" / "journal.json"
    return json.loads(path.read_text())["shards"] if path.is_file() else []


def inodes(folder: Path) -> set[int]:
    return {path.stat().st_ino for path in folder.glob("*.safetensors")}


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes(
    wide: Path, undisturbed: Path, processes: Any, tmp_path: Path
) -> None:
    moments, resumed = random.Random(5), 0
    for number in range(8):
        target = tmp_path / str(number) / "out"
        started = processes.Event()
        child = processes.Process(target=run_slowly, args=(wide, target, started))
        child.start()
        assert started.wait(60)
        ends = time.monotonic() + 60
        while number % 2 and not journal_of(target) and time.monotonic() < ends:
            time.sleep(0.01)  # else, on a busy machine, nothing may be finished by then
        time.sleep(moments.uniform(0, 0.4))
        child.kill()
        child.join()
        if target.exists():  # it was quicker
            assert contents(target) == contents(undisturbed)
            continue
        assert child.exitcode == -signal.SIGKILL
        shards = journal_of(target)
        kept = inodes(target.parent / ".out.partial") if shards else set()
        compress_folder(task_for(wide, target))
        assert contents(target) == contents(undisturbed)
        assert not (target.parent / ".out.partial").exists()
        finished = {shard["file"] for shard in shards if shard["names"]}
        assert len(inodes(target) & kept) >= len(finished)  # renamed, not written again
        resumed += bool(finished)
        shutil.rmtree(target.parent)
    assert resumed >= 2


def test_a_full_disk(wide: Path, undisturbed: Path, processes: Any, tmp_path: Path) -> None:
    target, told = tmp_path / "out", processes.Queue()
    child = processes.Process(target=fill_the_disk, args=(wide, target, told))
    child.start()
    message = told.get(timeout=60)
    child.join()
    assert "Make room and run the same command again" in message
    assert not target.exists()
    shards = journal_of(target)
    assert 0 < len(shards) < len(list(undisturbed.glob("*.safetensors")))
    assert not list((tmp_path / ".out.partial").glob("*.tmp"))
    compress_folder(task_for(wide, target))
    assert contents(target) == contents(undisturbed)


def test_other_work_does_not_resume(wide: Path, undisturbed: Path, tmp_path: Path) -> None:
    """What another compression left half-done is thrown away."""
    target = tmp_path / "out"

    def stop(done: int, total: int, what: str) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    other = FolderTask(source=wide, target=target, compressor=QUERIES, shard_bytes=60_000)
    with pytest.raises(KeyboardInterrupt):
        compress_folder(other, stop)
    assert journal_of(target)
    compress_folder(task_for(wide, target))
    assert contents(target) == contents(undisturbed)


def test_a_second_run_to_the_same_folder_is_refused(tmp_path: Path) -> None:
    tiny_model("gptj").save_pretrained(tmp_path / "in")
    target = tmp_path / "out"
    task = FolderTask(source=tmp_path / "in", target=target, compressor=HYBRID)
    with exclusive(target), pytest.raises(tl.UserError, match="another run is writing"):
        compress_folder(task)
    compress_folder(task)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
