"""Through the Trainer, with one process and with two: the same figures, a user's own
callbacks and loggers, and what a dead worker leaves.
"""

import csv
import logging
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import eval_world as world
import forked
import pytest
import yaml
from lightning.pytorch import Callback, Trainer

from tensorllm.commands.evaluate import evaluate
from tensorllm.compressors import SharedTucker4D
from tensorllm.data.example import Example
from tensorllm.data.questions import Questions
from tensorllm.errors import Incomplete, UserError
from tensorllm.evaluation.evaluate import evaluate_model
from tensorllm.evaluation.predictions import Prediction
from tensorllm.evaluation.results import read_results
from tensorllm.lightning import PerBatch, PredictionJournal, ReasoningModule
from tensorllm.lightning.trainer import Devices, run
from tensorllm.requests.evaluate import EvaluateRequest

pytestmark = pytest.mark.filterwarnings("ignore:::lightning", "ignore:.*treespec.*")
EXAMPLES = 101


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def questions_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "questions.jsonl"
    return world.save_questions(file, EXAMPLES, choices=True)


def quiet_trainer(*callbacks: Callback, logger: Any = False) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=logger,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


@pytest.mark.parametrize("kind", ["gptj", "llama", "roberta", "gpt2"])
def test_the_trainer_returns_what_the_function_does(kind: str, questions_file: Path):
    """Architectures are data: one module for all of them."""
    model, tokenizer = world.model(kind), world.tokenizer(masked=kind == "roberta")
    module = ReasoningModule(model, tokenizer)
    for split, stage in (("val", "validate"), ("test", "test"), ("all", "test")):
        want = evaluate_model(model, tokenizer, Questions(questions_file, split=split))
        data = Questions(questions_file, split="all" if split == "all" else "test")
        (logged,) = getattr(quiet_trainer(), stage)(module, data, verbose=False)
        assert logged == {name: want[name] for name in logged}, split  # bit for bit
        assert {"accuracy", "loss", "perplexity"} <= logged.keys()


class Asked(PerBatch):
    """A callback of the user's own."""

    def __init__(self) -> None:
        self.indices: list[int] = []

    def on_predictions(self, trainer: Any, predictions: list[Prediction]) -> None:
        self.indices += [p.index for p in predictions]


def test_validate_never_reads_what_test_reads(questions_file: Path):
    module = ReasoningModule(world.model("gptj"), world.tokenizer())
    everything = Questions(questions_file, split="all").examples
    for data in (Questions(questions_file), Questions(questions_file, split="all")):
        validated, tested = Asked(), Asked()
        quiet_trainer(validated).validate(module, data, verbose=False)
        quiet_trainer(tested).test(module, data, verbose=False)
        assert sorted(validated.indices) == [e.index for e in everything[:20]]
        assert sorted(tested.indices) == [e.index for e in data.examples]
    assert sorted(tested.indices) == [e.index for e in everything]
    assert [e.index for e in Questions(questions_file).examples] == [*range(20, EXAMPLES)]
    with pytest.raises(UserError, match=r"use trainer\.validate"):
        quiet_trainer().test(module, Questions(questions_file, split="val"), verbose=False)


def test_the_compressor_is_applied_once_and_changes_the_figures(questions_file: Path):
    model, tokenizer = world.model("gptj"), world.tokenizer()
    data = Questions(questions_file, split="all")
    (before,) = quiet_trainer().test(ReasoningModule(model, tokenizer), data, verbose=False)
    module = ReasoningModule(model, tokenizer, SharedTucker4D(ranks=(4, 2, 1)), layers=[1])
    (after,) = quiet_trainer().test(module, data, verbose=False)
    (again,) = quiet_trainer().test(module, data, verbose=False)
    assert after["loss"] != pytest.approx(before["loss"], abs=1e-3)
    assert again == after
    want = evaluate_model(model, tokenizer, data)  # the module edited this very model
    assert after["loss"] == want["loss"]


def test_loggers_of_lightning_get_metrics_and_settings(questions_file: Path, tmp_path: Path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path, name="mine")
    model, tokenizer = world.model("gptj"), world.tokenizer()
    module = ReasoningModule(
        model, tokenizer, SharedTucker4D(ranks=(4, 2, 1)), [1], "strict", prefix="test/"
    )
    trainer = quiet_trainer(logger=logger)
    (logged,) = trainer.test(module, Questions(questions_file), verbose=False)
    with (tmp_path / "mine" / "version_0" / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["test/loss"]) == pytest.approx(logged["test/loss"])
    settings = yaml.safe_load((tmp_path / "mine" / "version_0" / "hparams.yaml").read_text())
    assert settings == {
        "protocol": "strict", "mode": "shared-tucker", "layers": [1], "ranks": [4, 2, 1],
    }  # fmt: skip


class DiesAfter(PerBatch):
    """Ends the run at the third batch."""

    def __init__(self) -> None:
        self.batches = 0

    def on_predictions(self, trainer: Any, predictions: list[Prediction]) -> None:
        self.batches += 1
        if self.batches == 3:
            raise OSError("the machine goes down")


def test_a_journal_goes_on_and_the_metrics_count_all(questions_file: Path, tmp_path: Path):
    model, tokenizer = world.model("gptj"), world.tokenizer()
    module = ReasoningModule(model, tokenizer, batch_tokens=300)
    data = Questions(questions_file)
    (want,) = quiet_trainer().test(module, data, verbose=False)
    journal = PredictionJournal(tmp_path / "run")
    with pytest.raises(OSError, match="goes down"):
        quiet_trainer(journal, DiesAfter()).test(module, data, verbose=False)
    kept = PredictionJournal(tmp_path / "run").predictions()
    assert 0 < len(kept) < len(data.examples)
    rest = Asked()  # the same module and data: what the broken run left in them does not count
    trainer = quiet_trainer(PredictionJournal(tmp_path / "run"), rest)
    (got,) = trainer.test(module, data, verbose=False)
    assert len(rest.indices) + len(kept) == len(data.examples)
    assert got == pytest.approx(want, rel=1e-6)
    (again,) = quiet_trainer(PredictionJournal(tmp_path / "run")).test(module, data, verbose=False)
    assert again == got  # nothing was left to score
    other = ReasoningModule(model, tokenizer, protocol="paper")
    with pytest.raises(UserError, match=r"another run: protocol was strict and is paper"):
        quiet_trainer(PredictionJournal(tmp_path / "run")).test(other, data, verbose=False)


def test_data_of_another_kind_is_refused():
    from torch.utils.data import DataLoader

    module = ReasoningModule(world.model("gptj"), world.tokenizer())
    with pytest.raises(UserError, match="needs a ReasoningDataModule, got NoneType"):
        quiet_trainer().test(module, DataLoader([1]), verbose=False)  # type: ignore[arg-type]


def same(one: Prediction, other: Prediction) -> None:
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
                accelerator="cpu",
                devices=devices,
            )
        )

    one, two = run("1", tmp_path / "one"), run("2", tmp_path / "two")
    assert len(one.predictions) == len(two.predictions) == EXAMPLES
    for a, b in zip(one.predictions, two.predictions, strict=True):
        same(a, b)
    for name, value in one.results["metrics"].items():
        assert two.results["metrics"][name] == pytest.approx(value, rel=1e-6), name


@pytest.mark.slow
def test_processes_of_ddp_share_the_folder(folder: Path, questions_file: Path, tmp_path: Path):
    out = tmp_path / "out"
    options = {
        "--model": folder, "--dataset": "questions", "--data-file": questions_file,
        "--split": "all", "--out": out, "--accelerator": "cpu", "--devices": 2, "--strategy": "ddp",
        "--batch-tokens": 300,
    }  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    forked.run(["-m", "tensorllm", "evaluate", *words], check=True)
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
                devices="2",
                strategy="ddp",
            )
        )


class DiesOn(PerBatch):
    """Kills its own process with the first predictions."""

    def __init__(self, parent: int) -> None:
        self.parent = parent

    def on_predictions(self, trainer: Any, predictions: list[Prediction]) -> None:
        assert os.getpid() != self.parent
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_dead_worker_ends_the_run_with_a_clear_error(
    folder: Path, questions_file: Path, monkeypatch: pytest.MonkeyPatch
):
    from tensorllm.checkpoint.loader import Loader

    forked.spawn_off_a_server(monkeypatch)
    loader = Loader(folder)
    module = ReasoningModule(loader, loader.tokenizer())
    data = Questions(questions_file, split="all")
    devices = Devices(accelerator="cpu", devices="2")
    with pytest.raises(Incomplete, match=r"worker \d died \(SIGKILL\); run the same command again"):
        run(devices.trainer(callbacks=[DiesOn(os.getpid())]), module, data)


@pytest.mark.slow
def test_two_processes_go_on_from_a_killed_run(
    folder: Path, questions_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every example once, whichever process scored it and in whichever run."""
    from tensorllm.checkpoint.loader import Loader

    forked.spawn_off_a_server(monkeypatch)
    loader = Loader(folder)
    data = Questions(questions_file, split="all")
    (want,) = quiet_trainer().test(
        ReasoningModule(loader, loader.tokenizer(), batch_tokens=300), data, verbose=False
    )
    module = ReasoningModule(loader, loader.tokenizer(), batch_tokens=300)
    journal = PredictionJournal(tmp_path / "run")
    with pytest.raises(OSError, match="goes down"):
        quiet_trainer(journal, DiesAfter()).test(module, data, verbose=False)
    kept = len(journal.predictions())
    devices = Devices(accelerator="cpu", devices="2")
    module = ReasoningModule(loader, loader.tokenizer(), batch_tokens=300)
    data = Questions(questions_file, split="all")
    # A callback of its own: Lightning hangs the module on it, which cannot be sent.
    got = run(devices.trainer(callbacks=[PredictionJournal(journal.folder)]), module, data)
    assert sorted(r["index"] for r in journal.journal.records()) == list(range(EXAMPLES))
    assert len(list(journal.folder.glob("*.jsonl"))) == 3
    assert 0 < kept < EXAMPLES
    assert got == pytest.approx(want, rel=1e-6)


def test_running_text_is_not_for_masked_models(tmp_path: Path):
    model, tokenizer = world.model("roberta"), world.tokenizer(masked=True)
    file = tmp_path / "text.txt"
    file.write_text("the cat sings in Paris")
    with pytest.raises(UserError, match="running text needs a causal model"):
        evaluate_model(model, tokenizer, "text", data_file=file, split="all")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit_test_batch": 2}, "Did you mean 'limit_test_batches'"),
        ({"devices": 2}, "--trainer devices: give it as --devices"),
        ({"use_distributed_sampler": True}, "every example is scored once"),
        ({"limit_test_batches": 0}, "limit_test_batches must be above 0, got 0: nothing is scored"),
        ({"limit_val_batches": 0.0}, "limit_val_batches must be above 0, got 0.0"),
        ({"fast_dev_run": True}, "fast_dev_run .* give --limit N"),
        ({"callbacks": "no_package.Mine"}, "No module named 'no_package'"),
        ({"callbacks": ["pathlib.Path"]}, "pathlib.Path is no Callback"),
        ({"max_time": "soon"}, "^cannot run on .* --trainer max_time=soon"),
    ],
)
def test_wrong_options_of_the_trainer_are_one_line(options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        Devices(accelerator="cpu").trainer(options)


@pytest.mark.parametrize("devices", ["99999", "9" * 5000])
@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_no_more_processes_than_the_machine_has_cores(devices: str, strategy: str):
    with pytest.raises(
        UserError, match=r"--devices must be at most \d+, as this .* cores; got 9999"
    ):
        Devices(accelerator="cpu", devices=devices, strategy=strategy)


def test_no_more_processes_than_the_machine_has_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert Devices(accelerator="gpu", devices="2").several
    with pytest.raises(UserError, match="must be at most 2, as this machine has 2 GPUs; got 3"):
        Devices(accelerator="gpu", devices="3")


class Said(logging.Handler):
    """What was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage()


@pytest.fixture
def said() -> Iterator[Said]:
    """What Lightning's profilers say."""
    logger, handler = logging.getLogger("lightning.pytorch.profilers"), Said()
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def test_options_of_the_trainer_and_own_callbacks_reach_it(
    folder: Path, questions_file: Path, said: Said, tmp_path: Path
):
    request = EvaluateRequest(
        model=str(folder),
        dataset="questions",
        data_file=questions_file,
        batch_tokens=300,
        accelerator="cpu",
    )
    seen = Asked()
    named = ["test_eval_devices.Asked", seen]
    done = evaluate(replace(request, trainer={"callbacks": named, "profiler": "simple"}))
    assert sorted(seen.indices) == [p.index for p in done.predictions]
    assert "TEST Profiler Report" in said.text
    few = {"limit_test_batches": 1}
    advice = r"not scored.*\(--trainer limit_test_batches: to score fewer, give --limit N\); "
    with pytest.raises(Incomplete, match=advice + "with --out FOLDER the same command"):
        evaluate(replace(request, trainer=few))
    with pytest.raises(Incomplete, match=advice + "run the same command again"):
        evaluate(replace(request, trainer=few, out=tmp_path / "out"))


@pytest.mark.parametrize("wrong", [{"strategy": "nonsense"}, {"precision": "7"}, {"devices": "x"}])
def test_what_the_trainer_refuses_is_one_line(wrong: dict[str, str]):
    with pytest.raises(UserError, match=r"^cannot run on --accelerator [^\n]*$"):
        Devices(accelerator="cpu", **wrong).trainer()


@pytest.mark.parametrize(
    ("wrong", "named", "end"),
    [
        ({"accelerator": "gpuu"}, "--accelerator gpuu --devices 1", r"names are: .*cpu.*\.$"),
        ({"precision": "17"}, "--precision 17", r"\)$"),
    ],
)
def test_what_the_trainer_says_is_whole(wrong: dict[str, str], named: str, end: str):
    with pytest.raises(UserError, match=f"cannot run on .*{named}.*{end}") as caught:
        Devices(**wrong).trainer()
    assert "None" not in str(caught.value)


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
