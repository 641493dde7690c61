"""`compress --evaluate`: the model before and after, in the report and in one table."""

import json
from pathlib import Path
from typing import Any

import eval_world as world
import forked
import pytest
from printed import shown

from tensorllm.checkpoint.loader import Loader
from tensorllm.commands.compress import run
from tensorllm.errors import UserError
from tensorllm.evaluation.evaluate import evaluate_model
from tensorllm.reporting.tables import result_tables
from tensorllm.requests.compress import CompressRequest

KEYS = {"accuracy", "loss", "perplexity", "token_f1", "top_1", "examples", "dataset", "protocol"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return world.save_model(tmp_path / "model")


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return world.save_questions(tmp_path / "questions.jsonl", 40)


def laser(model: Path, **asked: Any) -> CompressRequest:
    """A request to edit one matrix."""
    edit = {"layers": (1,), "settings": {"rank": 2, "matrices": ["in"]}}
    return CompressRequest(model=str(model), mode="laser", **edit, **asked)


@pytest.mark.parametrize("form", [None, "dense", "factored"])
def test_before_and_after_are_those_of_evaluate(
    form: str | None, model: Path, questions: Path, tmp_path: Path
):
    out = None if form is None else tmp_path / "out"
    request = CompressRequest(
        model=str(model),
        mode="shared-tucker",
        layers=(1,),
        settings={"ranks": (8, 4, 2)},
        out=out,
        format=form,
        evaluate="questions",
        data_file=questions,
        limit=20,
    )
    report = run(request)
    scores = report.evaluation
    assert scores is not None
    assert KEYS <= scores["before"].keys() == scores["after"].keys()
    assert scores["before"]["examples"] == 20
    assert scores["before"]["loss"] != pytest.approx(scores["after"]["loss"], abs=1e-3)

    loader = Loader(model)
    want = evaluate_model(loader(), loader.tokenizer(), "questions", data_file=questions, limit=20)
    assert scores["before"] == pytest.approx(want)
    if out is not None:
        after = evaluate_model(
            Loader(out)(), loader.tokenizer(), "questions", data_file=questions, limit=20
        )
        assert scores["after"] == pytest.approx(after)
        assert json.loads((out / "report.json").read_text())["evaluation"] == scores


def test_one_table_shows_both(model: Path, questions: Path):
    report = run(laser(model, evaluate="questions", data_file=questions))
    assert report.evaluation is not None
    before, after = report.evaluation["before"], report.evaluation["after"]
    text = shown(result_tables(report))
    for name in ("accuracy", "loss"):
        line = next(line for line in text.splitlines() if line.lstrip().startswith(name))
        change = after[name] - before[name]
        digits = {"accuracy": 2, "loss": 4}[name]
        figures = [f"{before[name]:.{digits}f}", f"{after[name]:.{digits}f}"]
        assert line.split()[-3:] == [*figures, f"{change:+.{digits}f}"]
    assert "questions, test, strict" in text


def test_running_text_has_a_loss_and_no_accuracy(model: Path, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("One day a girl found a needle in her room. " * 20)
    report = run(laser(model, evaluate="text", data_file=text))
    printed = shown(result_tables(report))
    assert "loss, nats per token" in printed
    assert "accuracy" not in printed


def test_the_command_prints_them_as_json(model: Path, questions: Path):
    words = [
        *("compress", "--model", model, "--mode", "laser", "--rank", "2", "--layers", "1"),
        *("--evaluate", "questions", "--data-file", questions, "--limit", "8", "--json"),
    ]
    done = forked.run(["-m", "tensorllm", *words], check=True)
    scores = json.loads(done.stdout)["evaluation"]
    assert scores["before"]["examples"] == scores["after"]["examples"] == 8
    assert scores["before"]["protocol"] == "strict"


def test_both_models_are_scored_on_the_device_that_was_asked_for(
    model: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    devices = []

    def loader(folder: Path, dtype: Any = None, device: str = "cpu") -> Loader:
        devices.append(device)
        return Loader(folder, dtype, device)

    monkeypatch.setattr("tensorllm.commands.compress.Loader", loader)
    scored = {"evaluate": "questions", "data_file": questions, "limit": 5}
    run(laser(model, out=tmp_path / "out", device="cpu:0", **scored))
    assert devices == ["cpu:0", "cpu:0"]


def test_a_dataset_of_ones_own_can_be_scored(model: Path, questions: Path, tmp_path: Path):
    described = tmp_path / "own.yaml"
    described.write_text(f"data_file: {questions.name}\n")
    asked = laser(model, evaluate=str(described), limit=5)
    assert run(asked).evaluation["after"]["examples"] == 5
    described.write_text("data_fil: x\n")
    with pytest.raises(UserError, match="unknown key 'data_fil'"):
        run(asked)
