"""The study of the claim: rows apart, cells kept, verdicts that agree with scoring by hand."""

import io
import json
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tensorllm.commands import claims as claims_module
from tensorllm.commands.claims import ClaimStudy, claims
from tensorllm.compression.engine import compressed
from tensorllm.compressors.settings import make_compressor
from tensorllm.data.demo import MODEL_DIR
from tensorllm.errors import UserError
from tensorllm.evaluation.evaluate import make_dataset, score
from tensorllm.evaluation.predictions import Prediction
from tensorllm.reporting.claims import claims_tables
from tensorllm.reproduction.claims import Method, StudyDataset, StudyModel, loss_of, screening
from tensorllm.reproduction.claims_summary import corrected, edit_text
from tensorllm.reproduction.frequency import by_frequency, changed, edges, generic, trend
from tensorllm.requests.reproduce import ReproduceRequest

METHODS = (
    Method("laser", "laser", points=40),
    Method("shared-tucker, official", "shared-tucker", {"layout": "official"}, points=2),
)


@pytest.fixture
def small(tmp_path: Path) -> ReproduceRequest:
    return ReproduceRequest(
        study="claims", validation=32, limit=40, trials=2, draws=2, out=tmp_path / "out"
    )


def prediction(correct: bool, said: str = "x") -> Prediction:
    return Prediction(0, "", "gold", said, correct, -1.0, 1, 1, 0.0)


def files(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*.json") if p.name != "claims.json"}


def test_a_study_is_reported_kept_and_not_run_again(
    small: ReproduceRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = claims(small, methods=METHODS)
    assert [(c["method"], c["draw"]) for c in first["cells"]] == [
        (method.name, draw) for draw in (0, 1) for method in METHODS
    ]
    assert json.loads((small.out / "claims.json").read_text()) == {"demo": first}
    kept = files(small.out)
    monkeypatch.setattr(claims_module, "StudyModel", None)  # no model is needed
    assert claims(small, methods=METHODS) == first
    assert files(small.out) == kept
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(claims_tables(first))
    printed = console.export_text()
    assert "shared-tucker, official" in printed
    assert printed.count("→") == 4
    with pytest.raises(UserError, match=r"of another run: trials was 2 and is 3"):
        claims(replace(small, trials=3), methods=METHODS)


def test_a_cell_is_what_scoring_by_hand_says(small: ReproduceRequest) -> None:
    (cell,) = claims(replace(small, draws=1), methods=METHODS[:1])["cells"]
    data = make_dataset("demo", split="test", limit=40)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)

    def by_hand() -> list[bool | None]:
        rows = score(model, tokenizer, data.examples, max_new_tokens=data.max_new_tokens)
        return [row.correct for row in rows]

    before = by_hand()
    with compressed(
        model, make_compressor("laser", cell["point"]["settings"]), cell["point"]["layers"]
    ):
        after = by_hand()
    changes = Counter(zip(before, after, strict=True))
    assert cell["comparison"]["wrong_to_right"] == changes[False, True]
    assert cell["comparison"]["right_to_wrong"] == changes[True, False]
    assert cell["test"]["accuracy"]["value"] == pytest.approx(100 * sum(map(bool, after)) / 40)
    bins = cell["by_frequency"]
    assert sum(b["wrong_to_right"] for b in bins) == changes[False, True]
    assert sum(b["examples"] for b in bins) == 40


def test_a_killed_study_tells_what_is_done_and_goes_on(
    small: ReproduceRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = claims(replace(small, out=small.out / "whole"), methods=METHODS)
    choose, calls = StudyModel.choose, []

    def dies(self: StudyModel, *rest: Any) -> Any:
        calls.append(rest)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return choose(self, *rest)

    monkeypatch.setattr(StudyModel, "choose", dies)
    with pytest.raises(KeyboardInterrupt):
        claims(small, methods=METHODS)
    part = json.loads((small.out / "claims.json").read_text())["demo"]["cells"]
    assert [cell["found"] == "not run" for cell in part] == [False, False, True, True]
    found = claims(small, methods=METHODS)
    assert len(calls) == 5  # two, the one that died, and the two that were left
    assert [c["sentence"] for c in found["cells"]] == [c["sentence"] for c in whole["cells"]]


def test_studies_of_several_models_keep_each_others_results(tmp_path: Path) -> None:
    """Side by side, into one folder."""
    studies = [
        SimpleNamespace(name=f"model {n}", request=SimpleNamespace(out=tmp_path)) for n in range(20)
    ]
    with ThreadPoolExecutor(10) as threads:
        list(threads.map(lambda study: ClaimStudy.keep(study, {"of": study.name}), studies))
    kept = json.loads((tmp_path / "claims.json").read_text())
    assert kept == {study.name: {"of": study.name} for study in studies}


def test_a_method_that_is_not_for_the_model_is_said_to_be_so(
    small: ReproduceRequest, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "grouped")
    tokenizer.save_pretrained(tmp_path / "grouped")
    asked = replace(small, model=str(tmp_path / "grouped"), datasets=["demo"], draws=1)
    laser, official = claims(asked, methods=METHODS)["cells"]
    assert "point" in laser
    assert official["found"] == "not for this model"
    assert "ungrouped attention only" in official["sentence"]


def test_test_rows_are_never_drawn(small: ReproduceRequest) -> None:
    questions = ClaimStudy(small).questions["demo"]
    tested = {example.index for example in questions.test}
    draws = [questions.drawn(n, 32) for n in range(3)]
    for rows in draws:
        assert len({e.index for e in rows}) == 32
        assert not tested & {e.index for e in rows}
    assert draws[0] != draws[1]
    assert len(questions.drawn(0, 10**6)) == len(questions.pool) // 2
    for example, count in zip(questions.test, questions.frequency(), strict=True):
        assert count == sum(e.answer == example.answer for e in questions.pool)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 3}, "--layer does nothing without --study published"),
        ({"weights": "w"}, "--weights does nothing without --study published"),
        ({"dry_run": True}, "--dry-run does nothing without --study published"),
        ({"study": "clams"}, "--study must be one of published, claims"),
    ],
)
def test_options_of_the_other_study_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ReproduceRequest(**{"study": "claims", **options})


def test_a_folder_that_cannot_be_made_is_refused_before_anything_runs(
    small: ReproduceRequest, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to"):
        claims(replace(small, out=tmp_path / "file"), methods=())


def test_too_few_rows_are_refused_before_anything_runs(small: ReproduceRequest) -> None:
    with pytest.raises(UserError, match="8 rows or more, got 4 of demo"):
        claims(replace(small, validation=4), methods=METHODS)
    assert not small.out.exists()


def test_a_dataset_of_one_answer_is_refused(tmp_path: Path) -> None:
    rows = tmp_path / "one.jsonl"
    rows.write_text("".join(f'{{"prompt": "q{n}", "answer": "a"}}\n' for n in range(50)))
    (tmp_path / "one.yaml").write_text("data_file: one.jsonl\n")
    with pytest.raises(UserError, match=r"every answer of .* is 'a'"):
        StudyDataset(make_dataset(str(tmp_path / "one.yaml"), split="all"), None)


def test_holms_correction_decides_as_the_step_down_procedure() -> None:
    p_values = [0.004, 0.03, 0.011, 0.5, 0.0125, 0.04]
    cells = corrected([{"found": "not run"}, *({"p": p} for p in p_values)])
    assert "p_holm" not in cells[0]
    for level in (0.01, 0.05, 0.06, 0.07, 0.2):
        rejected, left = set(), sorted(p_values)
        while left and left[0] <= level / len(left):  # of the k that are left the least one
            rejected.add(left.pop(0))
        assert {
            p for p, c in zip(p_values, cells[1:], strict=True) if c["p_holm"] <= level
        } == rejected


def test_bins_hold_every_row_once_and_equal_frequencies_together() -> None:
    frequency = [0, 0, 0, 1, 1, 2, 5, 5, 5, 9, 40, 41]
    bins = edges(frequency)
    assert bins[0][0] == 0
    assert bins[-1][1] == 41
    for value in frequency:
        assert sum(low <= value <= high for low, high in bins) == 1
    assert edges([7, 7, 7]) == [(7, 7)]


def test_gains_of_rare_answers_are_seen() -> None:
    frequency = [0] * 10 + [50] * 10
    before = [prediction(False)] * 15 + [prediction(True)] * 5
    after = [prediction(n < 6) for n in range(20)]  # gains six rare ones, loses the five frequent
    rare, frequent = by_frequency(before, after, frequency)
    assert (rare["wrong_to_right"], rare["right_to_wrong"]) == (6, 0)
    assert (frequent["wrong_to_right"], frequent["right_to_wrong"]) == (0, 5)
    found = trend(before, after, frequency)
    assert found is not None
    assert found["spearman"] < -0.5
    assert trend(before, before, frequency) is None


def test_what_was_gained_and_lost_is_shown() -> None:
    before = [prediction(False, "a city"), prediction(True, "Rome"), prediction(True, "Bonn")]
    after = [prediction(True, "Paris"), prediction(False, "a city"), prediction(True, "Bonn")]
    assert changed(before, after) == {
        "gained": [{"answer": "gold", "before": "a city", "after": "Paris"}],
        "lost": [{"answer": "gold", "before": "Rome", "after": "a city"}],
    }


def test_generic_words_are_those_of_wrong_answers() -> None:
    before = [prediction(False, "a city"), prediction(False, "Member of"), prediction(True, "Rome")]
    after = [prediction(True, "Paris"), prediction(False, "member"), prediction(True, "Rome")]
    found = generic(before, after)
    assert found["words"] == {"city": [1, 0], "member": [1, 1]}
    assert found["before"] == pytest.approx(200 / 3)
    assert found["after"] == pytest.approx(100 / 3)


def test_edits_are_screened_layer_by_layer_in_two_orders() -> None:
    change = [-9.0, -8.0, -1.0, 1.0]  # two large edits of layer 0, two small ones of layer 1
    size = [1.0, 0.5, 0.01, 0.01]
    assert screening(change, size, [0, 0, 1, 1]) == [0, 2, 1, 3]
    assert screening([1.0, 0.0], [0.0, 0.0], [0, 1]) == [1, 0]  # nothing changes: no division


def test_the_loss_of_choices_is_among_them() -> None:
    row = replace(prediction(True), log_probability=-3.0, choice_log_probabilities=(-3.0, -4.0))
    assert loss_of([row]) == pytest.approx(math.log(1 + math.exp(-1)))
    assert loss_of([prediction(True)]) == 1.0


def test_an_edit_in_few_words() -> None:
    point = {"layers": [29], "settings": {"rho": 0.4, "matrices": ["gate"]}}
    assert edit_text(point) == "29: 0.4 gate"
