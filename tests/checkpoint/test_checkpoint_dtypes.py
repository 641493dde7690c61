"""16 bits are computed in float32 on a CPU that only emulates them, and results say so."""

from dataclasses import replace
from pathlib import Path

import eval_world as world
import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from tensorllm.checkpoint import loader
from tensorllm.checkpoint.loader import computing_dtype
from tensorllm.commands.compress import run
from tensorllm.commands.evaluate import evaluate
from tensorllm.compression.prepare import computing_dtype_of
from tensorllm.compression.task import FolderTask
from tensorllm.compressors import PlainSVD
from tensorllm.errors import UserError
from tensorllm.requests.compress import CompressRequest
from tensorllm.requests.evaluate import EvaluateRequest


def seconds(slow: torch.dtype):
    return lambda dtype: 1.0 if dtype == slow else 0.1


def test_the_faster_one_is_taken_on_a_cpu(monkeypatch: pytest.MonkeyPatch):
    dtype = torch.bfloat16
    monkeypatch.setattr(loader, "seconds_of_product", seconds(slow=dtype))
    assert computing_dtype(dtype, "cpu") == torch.float32
    assert computing_dtype(dtype, "cuda") == dtype
    monkeypatch.setattr(loader, "seconds_of_product", seconds(slow=torch.float32))
    assert computing_dtype(dtype, "cpu") == dtype
    monkeypatch.setattr(loader, "seconds_of_product", lambda dtype: 0.1)  # a tie: nothing changes
    assert computing_dtype(dtype, "cpu") == dtype
    assert computing_dtype(torch.float64, "cpu") == torch.float64
    monkeypatch.setattr(loader, "seconds_of_product", seconds(slow=torch.float16))
    assert computing_dtype(torch.float16, "cpu") == torch.float16  # an overflow must be seen
    assert computing_dtype(torch.float16, "cpu", overflows=False) == torch.float32


def test_the_measurement_takes_no_time_to_speak_of():
    loader.seconds_of_product.cache_clear()
    assert 0 < loader.seconds_of_product(torch.float32) < 1.0


def asking(folder: Path, **more: str) -> EvaluateRequest:
    """Six questions, asked of the model in a folder."""
    return EvaluateRequest(
        model=str(folder / "model"),
        dataset="questions",
        data_file=world.save_questions(folder / "rows.jsonl", 6),
        split="all",
        accelerator="cpu",
        **more,
    )


@pytest.mark.parametrize(
    ("slow", "computed"), [(torch.bfloat16, "float32"), (torch.float32, "bfloat16")]
)
def test_results_say_in_which(
    slow: torch.dtype, computed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    world.model("gptj").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    world.tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(loader, "seconds_of_product", seconds(slow))
    asked = asking(tmp_path)
    results = evaluate(asked).results
    assert (results["dtype"], results["stored_dtype"]) == (computed, "bfloat16")
    results = evaluate(replace(asked, dtype="fp32")).results
    assert results["dtype"] == "float32"


@pytest.mark.parametrize("precision", ["16", "bf16-mixed", "16-true", "bf16-true", "64", "32"])
def test_results_say_in_which_by_precision(precision: str, tmp_path: Path):
    """The one in which the model's products were computed, whatever the Trainer is asked for."""
    world.model("gptj").save_pretrained(tmp_path / "model")
    world.tokenizer().save_pretrained(tmp_path / "model")
    asked = asking(tmp_path, precision=precision)
    seen = set()

    def note(module: nn.Module, given: object, made: object) -> None:
        if isinstance(module, nn.Linear) and isinstance(made, torch.Tensor):
            seen.add(str(made.dtype).removeprefix("torch."))

    hook = register_module_forward_hook(note)
    try:
        results = evaluate(asked).results
    finally:
        hook.remove()
    assert {results["dtype"]} == seen
    assert results["stored_dtype"] == "float32"


@pytest.fixture
def slow_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CompressRequest:
    """A compression of a bfloat16 model where float32 is faster."""
    return asked_for(tmp_path, torch.bfloat16, torch.bfloat16, monkeypatch)


def asked_for(
    folder: Path, stored: torch.dtype, slow: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> CompressRequest:
    world.model("gptj").to(stored).save_pretrained(folder / "model")
    world.tokenizer().save_pretrained(folder / "model")
    words = " ".join(q.prompt for q in world.questions(200))
    (folder / "text.txt").write_text("\n".join([words] * 20))
    monkeypatch.setattr(loader, "seconds_of_product", seconds(slow))
    return CompressRequest(
        model=str(folder / "model"),
        mode="svd-llm",
        settings={"kept": 0.6},
        calibration=folder / "text.txt",
        sequences=8,
    )


def test_in_memory_a_fit_runs_in_the_faster_one_too(slow_bfloat16: CompressRequest):
    report = run(slow_bfloat16)
    assert report.settings["calibration"]["dtype"] == report.dtype == "float32"


def test_a_model_that_is_not_run_is_held_as_it_is_stored(slow_bfloat16: CompressRequest):
    decomposed = replace(
        slow_bfloat16, mode="svd", calibration=None, sequences=None, settings={"kept": 0.6}
    )
    assert run(decomposed).dtype == "bfloat16"


def test_bytes_in_memory_are_those_of_the_stored_dtype(slow_bfloat16: CompressRequest):
    folder = Path(slow_bfloat16.model)
    held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    target = {"target_bytes": int(0.8 * held)}
    assert run(replace(slow_bfloat16, settings=target)).dtype == "bfloat16"
    with pytest.raises(UserError, match="less than the weight files hold now"):
        run(replace(slow_bfloat16, settings={"target_bytes": int(1.1 * held)}))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stored", "slow", "computed"),
    [
        (torch.bfloat16, torch.bfloat16, "float32"),
        (torch.bfloat16, torch.float32, "bfloat16"),
        (torch.float16, torch.float16, "float32"),
    ],
)
def test_a_fit_runs_in_the_faster_one_and_is_written_as_it_was_stored(
    stored: torch.dtype,
    slow: torch.dtype,
    computed: str,
    stream: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    asked = asked_for(tmp_path, stored, slow, monkeypatch)
    asked = replace(asked, stream=stream, out=tmp_path / "out")
    report = run(asked)
    assert report.settings["calibration"]["dtype"] == computed
    assert f"The model ran in {computed}." in (tmp_path / "out/README.md").read_text()
    with safe_open(tmp_path / "out/model.safetensors", "pt") as held:
        kept = {held.get_tensor(name).dtype for name in held.keys()}  # noqa: SIM118
    assert kept == {stored}


def _decided(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    slow = torch.bfloat16 if rank else torch.float32
    loader.seconds_of_product = seconds(slow)
    task = FolderTask(source=folder / "model", compressor=PlainSVD(rank=1))
    (folder / f"{rank}.txt").write_text(str(computing_dtype_of(task)))
    torch.distributed.destroy_process_group()


def test_several_processes_fit_in_one_dtype(tmp_path: Path):
    """One of them finds float32 faster, the other one bfloat16."""
    world.model("gptj").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    torch.multiprocessing.spawn(_decided, (tmp_path,), nprocs=2)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["torch.float32"] * 2
