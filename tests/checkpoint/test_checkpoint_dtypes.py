"""16 bits are computed in float32 on a CPU that only emulates them, and results say so."""

from dataclasses import replace
from pathlib import Path

import eval_world as world
import pytest
import torch
from safetensors import safe_open

from tensorllm.checkpoint import loader
from tensorllm.checkpoint.loader import computing_dtype
from tensorllm.commands.compress import run
from tensorllm.commands.evaluate import evaluate
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


@pytest.mark.parametrize(
    ("slow", "computed"), [(torch.bfloat16, "float32"), (torch.float32, "bfloat16")]
)
def test_results_say_in_which(
    slow: torch.dtype, computed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    world.model("gptj").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    world.tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(loader, "seconds_of_product", seconds(slow))
    asked = EvaluateRequest(
        model=str(tmp_path / "model"),
        dataset="questions",
        data_file=world.save_questions(tmp_path / "rows.jsonl", 6),
        split="all",
        accelerator="cpu",
    )
    results = evaluate(asked).results
    assert (results["dtype"], results["stored_dtype"]) == (computed, "bfloat16")
    results = evaluate(replace(asked, dtype="fp32")).results
    assert results["dtype"] == "float32"


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
    world.model("gptj").to(stored).save_pretrained(tmp_path / "model")
    world.tokenizer().save_pretrained(tmp_path / "model")
    words = " ".join(q.prompt for q in world.questions(200))
    (tmp_path / "text.txt").write_text("\n".join([words] * 20))
    monkeypatch.setattr(loader, "seconds_of_product", seconds(slow))
    asked = CompressRequest(
        model=str(tmp_path / "model"),
        mode="svd-llm",
        settings={"kept": 0.6},
        calibration=tmp_path / "text.txt",
        sequences=8,
        stream=stream,
        out=tmp_path / "out",
    )
    report = run(asked)
    assert report.settings["calibration"]["dtype"] == computed
    assert f"The model ran in {computed}." in (tmp_path / "out/README.md").read_text()
    with safe_open(tmp_path / "out/model.safetensors", "pt") as held:
        kept = {held.get_tensor(name).dtype for name in held.keys()}  # noqa: SIM118
    assert kept == {stored}
