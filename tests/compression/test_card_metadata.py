"""Metadata of model cards, read back by the hub's own classes: origin, licence, measurements."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_text import text
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from report_runs import run
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

import tensorllm as tl
from tensorllm.compression.card import card, rewrite_card
from tensorllm.compression.narrow import narrow
from tensorllm.compression.origin import licence_files, origin
from tensorllm.compressors import MoDeGPT
from tensorllm.evaluation.before_after import BeforeAfter

APACHE = "\n                  Apache License\n            Version 2.0, January 2004\n   TERMS ...\n"
MEASURED = BeforeAfter(
    dataset="wikidata_qa",
    split="test",
    protocol="strict",
    examples=300,
    seed=0,
    before={"accuracy": 12.666667, "loss": 5.6927, "perplexity": 297.7, "token_f1": 6.0},
    after={"accuracy": 23.0, "loss": 5.417, "perplexity": 225.2, "token_f1": 16.3},
    intervals_before={"accuracy": [9.0, 16.5]},
    intervals_after={"accuracy": [18.33333, 28.0]},
    comparison=None,
)


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """A model in a cache of the hub, without a card but with its licence."""
    folder = tmp_path / "models--owner--small" / "snapshots" / ("a" * 40)
    tiny_model("llama").save_pretrained(folder)
    (folder / "LICENSE.txt").write_text(APACHE)
    return folder


@pytest.fixture
def compressed(original: Path, tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(original)
    tl.compress(model, tl.LaserSVD(rho=0.5, matrices=("in",)), layers=[0])
    tl.save(model, tmp_path / "out")
    return tmp_path / "out"


def test_the_hub_reads_what_was_measured(compressed: Path) -> None:
    rewrite_card(compressed, [MEASURED])
    found = ModelCard.load(compressed / "README.md").data
    assert found.eval_results is not None
    by_metric = {result.metric_type: result for result in found.eval_results}
    assert set(by_metric) == {"accuracy", "loss", "perplexity"}
    accuracy = by_metric["accuracy"]
    assert accuracy == EvalResult(
        task_type="text-generation",
        dataset_type="tasksource/bigbench",
        dataset_name="wikidata_qa",
        dataset_config="qa_wikidata",
        dataset_split="test",
        dataset_args={"protocol": "strict", "examples": 300},
        metric_type="accuracy",
        metric_name="accuracy, %",
        metric_value=23.0,
        metric_args={"interval_95": [18.3333, 28.0], "original_model": 12.6667},
    )
    # a round trip through the hub's own form changes nothing
    name, results = model_index_to_eval_results(found.to_dict()["model-index"])
    assert results == found.eval_results
    assert name.endswith("-laser")
    rewrite_card(compressed, [MEASURED])
    assert ModelCard.load(compressed / "README.md").data.to_dict() == found.to_dict()


def test_a_dataset_that_the_hub_has_not_goes_by_its_name(compressed: Path) -> None:
    report, config = (
        json.loads((compressed / n).read_text()) for n in ("report.json", "config.json")
    )
    values: dict[str, Any] = {"intervals_before": {}, "intervals_after": {}, "before": None}
    own = BeforeAfter("questions", "test", "strict", 9, 0, after={"accuracy": 50.0},
                      comparison=None, **values)  # fmt: skip
    (result,) = ModelCard(card(report, config=config, measured=[own])).data.eval_results or []
    assert (result.dataset_type, result.dataset_name) == ("questions", "questions")
    assert result.metric_args is None


def test_origin_and_licence_are_said(original: Path, compressed: Path, tmp_path: Path) -> None:
    """From the folder's place and files, in memory as on disk; and again from what was made."""
    again = tmp_path / "again"
    options = ("--mode", "laser", "--rank", 2, "--layers", 0, "--out", again)
    assert run("compress", "--model", original, *options) == 0
    assert run("export", compressed, tmp_path / "dense") == 0
    for folder in (compressed, again, tmp_path / "dense"):
        data = ModelCard.load(folder / "README.md").data
        assert data.license == "apache-2.0", folder
        assert (folder / "LICENSE.txt").read_text() == APACHE
    assert ModelCard.load(again / "README.md").data.base_model == "owner/small"


def test_the_cards_own_words_go_first(original: Path, tmp_path: Path) -> None:
    own = "---\nlicense: other\nlicense_name: mine\nbase_model: owner/parent\n---\n# A model\n"
    local = tmp_path / "local"
    original.rename(local)
    (local / "README.md").write_text(own)
    model = AutoModelForCausalLM.from_pretrained(local)
    tl.compress(model, tl.LaserSVD(rho=0.5, matrices=("in",)), layers=[0])
    tl.save(model, tmp_path / "out")
    data = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "mine")
    assert data["base_model"] == "owner/parent"  # the nearest that has a name on the hub
    assert data["library_name"] == "tensorllm"


def test_a_card_without_metadata_is_text_and_nothing_is_said_of_it(
    original: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (original / "README.md").write_text("# Mine\n")
    model = AutoModelForCausalLM.from_pretrained(original)
    tl.compress(model, tl.LaserSVD(rho=0.5, matrices=("in",)), layers=[0])
    tl.save(model, tmp_path / "out")
    caplog.clear()
    rewrite_card(tmp_path / "out", [])
    (tmp_path / "out" / "README.md").write_text("# Mine\n")
    rewrite_card(tmp_path / "out", [])
    assert not caplog.records


@pytest.mark.parametrize(
    ("words", "want"),
    [
        (APACHE, {"license": "apache-2.0"}),
        ("# MIT License\n\nCopyright", {"license": "mit"}),
        ("LLAMA 2 COMMUNITY LICENSE AGREEMENT\n", {"license": "llama2"}),
        (
            "Do as you like.\nNot the MIT License, though it would be as good, for it says much.",
            {"license": "other", "license_name": "licence", "license_link": "LICENCE.md"},
        ),
    ],
)
def test_licences_are_told_by_their_beginning(
    words: str, want: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "LICENCE.md").write_text(words)
    assert origin(tmp_path) == want
    assert [path.name for path in licence_files(tmp_path)] == ["LICENCE.md"]


def test_a_narrow_folder_has_the_card_of_what_it_was_made_of(tmp_path: Path) -> None:
    model = tiny_model("llama")
    ffn = MoDeGPT(kept=0.4, matrices=("in", "gate", "out"))
    tl.compress(model, ffn, calibration=text())
    tl.save(model, tmp_path / "wide")
    own = (tmp_path / "wide" / "README.md").read_text()
    (tmp_path / "wide" / "README.md").write_text(own.replace("---\n", "---\nlicense: mit\n", 1))
    narrow(tmp_path / "wide", tmp_path / "narrow")
    found = ModelCard.load(tmp_path / "narrow" / "README.md")
    assert (found.data.license, found.data.library_name) == ("mit", "transformers")
    assert "import tensorllm" not in found.text
    assert "--format narrow --out FOLDER" in found.text


def test_a_config_may_name_the_licence(tmp_path: Path) -> None:
    assert origin(tmp_path) == {}
    (tmp_path / "config.json").write_text('{"license": "mit"}')
    assert origin(tmp_path) == {"license": "mit"}
    (tmp_path / "config.json").write_text('{"license": ["mit"]}')
    assert origin(tmp_path) == {}


def test_a_factored_model_that_saves_itself_has_a_card(compressed: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed)
    model.save_pretrained(tmp_path / "again")
    data = ModelCard.load(tmp_path / "again" / "README.md").data
    assert data.library_name == "tensorllm"
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path / "again")(torch.arange(4)[None]).logits,
        model(torch.arange(4)[None]).logits,
    )
