"""Through the Trainer, with one process and with two: the same figures and rows, and what a dead
worker leaves.
"""

import os
import signal
from dataclasses import asdict
from pathlib import Path

import eval_world as world
import pytest
from lightning.pytorch import Trainer

from tensorllm.commands.devices import Devices
from tensorllm.commands.evaluate import EvaluateRequest, evaluate
from tensorllm.compressors import SharedTucker4D
from tensorllm.data.example import Example
from tensorllm.data.questions import Questions
from tensorllm.errors import Incomplete, UserError
from tensorllm.evaluation.evaluate import evaluate_model
from tensorllm.evaluation.results import read_results
from tensorllm.evaluation.row import Row
from tensorllm.lightning import (
    CausalReasoner,
    GPTJReasoner,
    LlamaReasoner,
    MaskedReasoner,
    RobertaReasoner,
    reasoner_of,
)

pytestmark = pytest.mark.filterwarnings("ignore:::lightning", "ignore:.*treespec.*")
EXAMPLES = 101


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-J checkpoint with its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    world.model("gptj").save_pretrained(path)
    world.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def questions_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import json

    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    rows = [
        {"prompt": e.prompt, "answer": e.answer, "choices": list(e.choices)}
        for e in world.questions(EXAMPLES)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def quiet_trainer() -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def test_validate_logs_what_the_function_returns(questions_file: Path):
    model, tokenizer = world.model("gptj"), world.tokenizer()
    want = evaluate_model(model, tokenizer, Questions(questions_file, split="all"))
    (logged,) = quiet_trainer().validate(
        GPTJReasoner(model, tokenizer), Questions(questions_file, split="all"), verbose=False
    )
    assert logged["accuracy"] == pytest.approx(want["accuracy"])
    assert logged["loss"] == pytest.approx(want["loss"], rel=1e-5)
    assert logged["perplexity"] == pytest.approx(want["perplexity"], rel=1e-4)


def test_the_compressor_is_applied_once_and_changes_the_figures(questions_file: Path):
    model, tokenizer = world.model("gptj"), world.tokenizer()
    data = Questions(questions_file, split="all")
    (before,) = quiet_trainer().validate(CausalReasoner(model, tokenizer), data, verbose=False)
    module = CausalReasoner(model, tokenizer, SharedTucker4D(ranks=(4, 2, 1)), layers=[1])
    (after,) = quiet_trainer().validate(module, data, verbose=False)
    (again,) = quiet_trainer().validate(module, data, verbose=False)
    assert after["loss"] != pytest.approx(before["loss"], abs=1e-3)
    assert again == after


def test_each_architecture_has_its_class():
    gptj, llama, roberta = (world.model(kind) for kind in ("gptj", "llama", "roberta"))
    assert reasoner_of(gptj) is GPTJReasoner
    assert reasoner_of(llama) is LlamaReasoner
    assert reasoner_of(roberta) is RobertaReasoner
    assert reasoner_of(world.model("gpt2")) is CausalReasoner
    with pytest.raises(UserError, match="'gptj' is needed, got 'llama'"):
        GPTJReasoner(llama, world.tokenizer())
    with pytest.raises(UserError, match="causal model is needed, got RobertaForMaskedLM"):
        CausalReasoner(roberta, world.tokenizer(masked=True))
    with pytest.raises(UserError, match="masked model is needed"):
        MaskedReasoner(gptj, world.tokenizer(masked=True))


def test_masked_models_validate(questions_file: Path):
    module = RobertaReasoner(world.model("roberta"), world.tokenizer(masked=True))
    data = Questions(questions_file, split="val")
    (logged,) = quiet_trainer().validate(module, data, verbose=False)
    assert logged["loss"] > 0


def same(one: Row, other: Row) -> None:
    a, b = asdict(one), asdict(other)
    for name in ("log_probability", "choice_log_probabilities"):
        # batches of another shape add floats in another order
        assert a.pop(name) == pytest.approx(b.pop(name), abs=1e-4)
    assert a == b


@pytest.mark.slow
def test_two_processes_equal_one(folder: Path, questions_file: Path, tmp_path: Path):
    def run(devices: str, out: Path) -> object:
        return evaluate(
            EvaluateRequest(
                model=str(folder),
                dataset="questions",
                data_file=questions_file,
                split="all",
                out=out,
                batch_tokens=300,
                devices=Devices(accelerator="cpu", devices=devices),
            )
        )

    one, two = run("1", tmp_path / "one"), run("2", tmp_path / "two")
    assert len(one.rows) == len(two.rows) == EXAMPLES
    for a, b in zip(one.rows, two.rows, strict=True):
        same(a, b)
    for name, value in one.results["metrics"].items():
        assert two.results["metrics"][name] == pytest.approx(value, rel=1e-6), name


@pytest.mark.slow
def test_processes_of_ddp_share_the_folder(folder: Path, questions_file: Path, tmp_path: Path):
    import subprocess
    import sys

    out = tmp_path / "out"
    options = {
        "--model": folder, "--dataset": "questions", "--data-file": questions_file,
        "--split": "all", "--out": out, "--accelerator": "cpu", "--devices": 2, "--strategy": "ddp",
        "--batch-tokens": 300,
    }  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    subprocess.run([sys.executable, "-m", "tensorllm", "evaluate", *words], check=True, timeout=250)
    model, tokenizer = world.model("gptj"), world.tokenizer()
    want = evaluate_model(model, tokenizer, Questions(questions_file, split="all"))
    results, rows = read_results(out)
    assert len(rows) == EXAMPLES
    for name, value in results["metrics"].items():
        assert value == pytest.approx(want[name], rel=1e-5), name
    with pytest.raises(UserError, match="give --out"):
        evaluate(
            EvaluateRequest(
                model=str(folder),
                dataset="questions",
                data_file=questions_file,
                devices=Devices(devices="2", strategy="ddp"),
            )
        )


class DiesOn:
    """Kills its own process when it is asked to keep the first rows."""

    def __init__(self, parent: int) -> None:
        self.parent = parent

    def __call__(self, rows: list[Row]) -> None:
        assert os.getpid() != self.parent
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_dead_worker_ends_the_run_with_a_clear_error(folder: Path, questions_file: Path):
    from tensorllm.commands.devices import validate
    from tensorllm.commands.models import Loader

    loader = Loader(folder)
    module = CausalReasoner(loader, loader.tokenizer(), on_rows=DiesOn(os.getpid()))
    data = Questions(questions_file, split="all")
    with pytest.raises(Incomplete, match=r"worker \d died \(SIGKILL\); run the same command again"):
        validate(Devices(accelerator="cpu", devices="2"), module, data)


def test_running_text_is_not_for_masked_models(tmp_path: Path):
    model, tokenizer = world.model("roberta"), world.tokenizer(masked=True)
    file = tmp_path / "text.txt"
    file.write_text("the cat sings in Paris")
    with pytest.raises(UserError, match="running text needs a causal model"):
        evaluate_model(model, tokenizer, "text", data_file=file, split="all")


@pytest.mark.parametrize("wrong", [{"strategy": "nonsense"}, {"precision": "7"}, {"devices": "x"}])
def test_what_the_trainer_refuses_is_one_line(wrong: dict[str, str]):
    with pytest.raises(UserError, match=r"^cannot run on --devices [^\n]*$"):
        Devices(accelerator="cpu", **wrong).trainer()


def test_examples_are_plain_data():
    import pickle

    example = Example("a", "b", ("b", "c"), 3)
    assert pickle.loads(pickle.dumps(example)) == example


@pytest.mark.parametrize(
    ("gpus", "accelerator", "several"),
    [(0, "auto", False), (1, "auto", False), (2, "gpu", True), (2, "cpu", False)],
)
def test_auto_may_be_several_devices(
    gpus: int, accelerator: str, several: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert Devices(devices="auto", accelerator=accelerator).several is several
