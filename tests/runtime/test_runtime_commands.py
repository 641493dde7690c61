"""generate, export and bench: from Python, and as commands."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import tensorllm as tl
from tensorllm.calibration.sampled import sampled_text
from tensorllm.checkpoint.loader import Loader
from tensorllm.checkpoint.loading import choices_of
from tensorllm.commands.bench import bench
from tensorllm.commands.compress import run
from tensorllm.commands.evaluate import evaluate
from tensorllm.commands.export import run as export_run
from tensorllm.commands.generate import generate
from tensorllm.compression.export import export
from tensorllm.data.demo import MODEL_DIR
from tensorllm.data.tokens import as_messages
from tensorllm.errors import Incomplete, UserError
from tensorllm.requests.compress import CompressRequest
from tensorllm.requests.evaluate import EvaluateRequest
from tensorllm.requests.others import BenchRequest, ExportRequest, GenerateRequest
from tensorllm.runtime.attention import FactoredAttention
from tensorllm.runtime.measure import interleaved, weight_bytes
from tensorllm_cli import bench as bench_command
from tensorllm_cli import export as export_command
from tensorllm_cli import generate as generate_command


@pytest.fixture(scope="module")
def story_folder(tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small trained model, factored, with its tokenizer."""
    folder = tmp_path_factory.mktemp("stories") / "out"
    model = AutoModelForCausalLM.from_pretrained(tinystories, dtype=torch.float32)
    tl.compress(model, tl.Hybrid(ranks=(64, 8, 3), rho=0.5))
    tl.save(model, folder, tokenizer=AutoTokenizer.from_pretrained(tinystories))
    return folder


def command(module: Any, name: str, *arguments: str) -> Any:
    app = typer.Typer()
    app.command()(getattr(module, name))
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


LOAD = Loader.__call__


def with_nan(loader: Loader) -> Any:
    model = LOAD(loader)
    next(model.parameters()).data[:, 0] = float("nan")
    return model


def test_generate_writes_what_the_dense_model_would(story_folder: Path):
    prompts = ("Once upon a time", "Lily had a big red ball")
    texts = generate(GenerateRequest(model=str(story_folder), prompts=prompts, max_new_tokens=12))
    dense, tokenizer = tl.load(story_folder), AutoTokenizer.from_pretrained(story_folder)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        want = dense.generate(ids, max_new_tokens=12, do_sample=False)
        assert text == tokenizer.decode(want[0], skip_special_tokens=True)
    run = command(
        generate_command, "generate", "--model", str(story_folder), "--prompt", prompts[0],
        "--max-new-tokens", "12", "--json",
    )  # fmt: skip
    assert json.loads(run.stdout)[0]["text"] == texts[0]


def test_fewer_tokens_than_asked_for_are_said(
    story_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    generate(GenerateRequest(model=str(story_folder), prompts=("Once",), max_new_tokens=9999))
    context = AutoModelForCausalLM.from_pretrained(story_folder).config.max_position_embeddings
    assert f"tokens are written, not 9999: the model reads {context}" in caplog.text


@pytest.mark.parametrize("name", ["hotpotqa", "fever"])
def test_evaluate_runs_factors_and_finds_what_the_export_does(
    name: str, story_folder: Path, shared_dir: Path, tmp_path: Path
):
    file = {"hotpotqa": "hotpot_dev.jsonl", "fever": "fever_paper_dev.jsonl"}[name]
    export(story_folder, tmp_path / "dense")
    folders = (story_folder, tmp_path / "dense")
    factored = Loader(story_folder)()
    assert any(isinstance(m, FactoredAttention) for m in factored.modules())
    rows, dense = (
        evaluate(
            EvaluateRequest(
                model=str(folder), dataset=name, data_file=shared_dir / "data" / file, limit=40
            )
        ).predictions
        for folder in folders
    )
    assert [r.correct for r in rows] == [r.correct for r in dense]
    assert [r.loss for r in rows] == pytest.approx([r.loss for r in dense], abs=1e-4)


def test_what_cannot_run_factored_is_evaluated_dense(tmp_path: Path):
    model = tiny_model("gptj")
    tl.compress(model, tl.SharedTucker4D(ranks=(20, 4, 2), layout="official"))
    tl.save(model, tmp_path / "out")
    loaded = Loader(tmp_path / "out")()
    ids = torch.arange(3, 14)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [{"prompts": ()}, {"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"beams": 0}],
)
def test_generate_refuses_what_makes_no_sense(wrong: dict[str, Any], story_folder: Path):
    with pytest.raises(UserError):
        generate(GenerateRequest(**{"model": str(story_folder), "prompts": ("a",), **wrong}))


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_whose_scores_are_nan_writes_nothing(
    temperature: float, beams: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Loader, "__call__", with_nan)
    asked = GenerateRequest(model="demo", prompts=("Ada Moss",), temperature=temperature)
    with pytest.raises(UserError, match="scores of the next token are NaN: its weights hold NaN"):
        generate(replace(asked, beams=beams))


def test_a_model_whose_scores_are_nan_is_not_sampled():
    with pytest.raises(UserError, match="scores of the next token are NaN"):
        sampled_text(with_nan(Loader(MODEL_DIR)), sequences=2, length=4)


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds no tokenizer: copy"):
        Loader(tmp_path).tokenizer()


@torch.no_grad()
def test_export_is_the_dense_model(story_folder: Path, tmp_path: Path):
    run = command(export_command, "export", str(story_folder), str(tmp_path / "dense"))
    assert run.exit_code == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    want = tl.load(story_folder)
    for (name, a), b in zip(exported.state_dict().items(), want.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert (tmp_path / "dense" / "tokenizer.json").is_file()
    with pytest.raises(UserError, match="dense already"):
        export(tmp_path / "dense", tmp_path / "twice")
    with pytest.raises(UserError, match="exists"):
        export(story_folder, tmp_path / "dense")
    with pytest.raises(UserError, match="got 'zip'"):
        export_run(ExportRequest(folder=story_folder, out=tmp_path / "other", format="zip"))
    export(story_folder, tmp_path / "half", dtype=torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


@pytest.mark.parametrize(("cache", "kept"), [("latent", 8), ("dense", 16)])
def test_bench_counts_bytes_that_are_there(story_folder: Path, cache: Any, kept: int):
    sizes = {"prompt_tokens": 20, "new_tokens": 3, "repeats": 1}
    found = bench(BenchRequest(model=story_folder, **sizes, cache=cache, peak=False))
    dense, small = found.models["dense"], found.models["factored"]
    config = tl.load(story_folder).config
    heads = config.num_key_value_heads * config.num_hidden_layers * 20 * 4
    width = config.hidden_size // config.num_attention_heads
    assert (dense.value_bytes, small.value_bytes) == (heads * width, heads * kept)
    assert small.weight_bytes == weight_bytes(AutoModelForCausalLM.from_pretrained(story_folder))
    assert found.ratios()["weights"] == dense.weight_bytes / small.weight_bytes
    assert all(choice.factored for choice in found.choices)
    with pytest.raises(UserError, match="fit the model's"):
        bench(BenchRequest(model=story_folder, prompt_tokens=10**6))
    with pytest.raises(UserError, match="repeats"):
        bench(BenchRequest(model=story_folder, repeats=0))


def test_bench_says_how_far_it_is(story_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tensorllm.commands.bench._peak", lambda *_: 1)
    reported: list[tuple[int, int, str]] = []
    sizes = {"prompt_tokens": 4, "new_tokens": 1, "repeats": 2}
    bench(BenchRequest(model=story_folder, **sizes), lambda *update: reported.append(update))
    turns = [(n, 8, "prefill" if n <= 4 else "decode") for n in range(1, 9)]
    assert reported == [*turns, (0, 2, "memory, dense"), (1, 2, "memory, factored")]


def test_bench_takes_what_fits_a_small_model(tmp_path: Path):
    """The demo's context is 32 tokens: a quarter is decoded, the rest is the prompt."""
    folder = tmp_path / "out"
    run(CompressRequest(model="demo", mode="shared-tucker", out=folder, format="factored"))
    found = bench(BenchRequest(model=folder, repeats=1, peak=False))
    assert (found.prompt_tokens, found.new_tokens) == (24, 8)
    assert found.to_json()["prompt_tokens"] == 24


@pytest.mark.slow
def test_bench_measures_peaks_of_its_own_processes(story_folder: Path):
    run = command(
        bench_command, "bench", "--model", str(story_folder), "--prompt-tokens", "16",
        "--new-tokens", "2", "--repeats", "1", "--json",
    )  # fmt: skip
    values = json.loads(run.stdout)
    assert all(model["peak_bytes"] > 10**8 for model in values["models"].values())
    assert {"prefill", "decode", "weights", "values", "peak"} <= values["ratios"].keys()


@torch.no_grad()
def test_auto_loads_a_folder_partly_dense(tmp_path: Path):
    dense = tiny_model("llama", intermediate_size=16_384)
    tl.compress(dense, tl.Hybrid(ranks=(32, 8, 6), rho=0.2, matrices=("in",)))
    tl.save(dense, tmp_path / "out")
    model = tl.load(tmp_path / "out", policy="auto")
    choices = choices_of(model)
    assert {choice.site for choice in choices if choice.factored} == {"layers.0.in", "layers.1.in"}
    assert not any(isinstance(m, FactoredAttention) for m in model.modules())
    ids = torch.arange(3, 14)[None]
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="policy must be"):
        tl.load(tmp_path / "out", policy="never")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="is not factored"):
        tl.load(tmp_path, policy="always")


def test_generate_and_bench_take_auto_for_a_device(story_folder: Path):
    asked = GenerateRequest(model=str(story_folder), prompts=("Once",), max_new_tokens=1)
    assert generate(replace(asked, device="auto")) == generate(asked)
    sizes = {"prompt_tokens": 4, "new_tokens": 1, "repeats": 1, "peak": False}
    bench(BenchRequest(model=story_folder, device="auto", **sizes))
    with pytest.raises(UserError, match="--device must be one of auto, cpu, cuda, mps, got 'gpu'"):
        generate(replace(asked, device="gpu"))


def test_generate_ends_where_the_context_does():
    words = "Ada Moss plays banjo . " * 12  # the demo reads 32 tokens
    with pytest.raises(UserError, match="below the model's 32 tokens, got 60"):
        generate(GenerateRequest(model="demo", prompts=(words,)))
    (text,) = generate(GenerateRequest(model="demo", prompts=("Ada Moss",), temperature=5.0))
    assert len(text.split()) <= 32


def test_a_measurement_that_was_killed_is_told(story_folder: Path, monkeypatch):
    killed = subprocess.CompletedProcess([], -9, stdout="", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: killed)
    sizes = {"prompt_tokens": 4, "new_tokens": 1, "repeats": 1}
    with pytest.raises(Incomplete, match=r"memory failed \(exit code -9\): killed"):
        bench(BenchRequest(model=story_folder, **sizes))


def test_warming_up_is_over_before_the_first_turn(monkeypatch):
    order: list[str] = []
    monkeypatch.setattr("tensorllm.runtime.measure._wait", lambda: order.append("wait"))
    interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 1)
    assert order == ["a", "b", "wait", "a", "wait", "b", "wait"]


def test_settings_of_the_model_for_generation_are_met(story_folder: Path, tmp_path: Path):
    folder = tmp_path / "stops"
    shutil.copytree(story_folder, folder)
    settings = {"num_return_sequences": 2, "do_sample": True, "stop_strings": ["t"]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    asked = GenerateRequest(
        model=str(folder), prompts=("Once upon a time", "Lily saw the park and")
    )
    for prompt, text in zip(asked.prompts, generate(asked), strict=True):
        written = text.removeprefix(prompt)
        assert "t" in written
        assert len(written) < 20  # a token or a few, not all 64
        assert [text] == generate(replace(asked, prompts=(prompt,)))  # no padding behind it


def test_a_prompt_is_refused_before_the_model_is_loaded(story_folder: Path, monkeypatch):
    monkeypatch.setattr("tensorllm.commands.generate.loaded", None)
    asked = GenerateRequest(model=str(story_folder), prompts=("a",))
    with pytest.raises(UserError, match="has no chat template"):
        generate(replace(asked, chat=True))
    with pytest.raises(UserError, match="the prompt must be below the model's"):
        generate(replace(asked, prompts=("a " * 9000,)))


def test_a_chat_is_answered_through_the_template(story_folder: Path, tmp_path: Path):
    folder = tmp_path / "chat"
    shutil.copytree(story_folder, folder)
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %} and then"
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rendered = f"{tokenizer.bos_token}Once upon a time and then"
    (ids,) = as_messages(tokenizer, ["Once upon a time"], "it")
    assert ids == tokenizer(rendered, add_special_tokens=False).input_ids
    asked = GenerateRequest(model=str(folder), prompts=("Once upon a time",), max_new_tokens=6)
    (answer,) = generate(replace(asked, chat=True))
    assert answer
    assert "Once upon" not in answer
    with pytest.raises(UserError, match="has no chat template"):
        generate(GenerateRequest(model=str(story_folder), prompts=("a",), chat=True))
