"""Verdicts and guards on planted predictions whose cause is known."""

import random
from typing import Any

import pytest

from tensorllm.evaluation.predictions import Prediction
from tensorllm.evaluation.statistics import compared
from tensorllm.search.objectives import OBJECTIVES
from tensorllm.search.verdict import guards_of, verdict

GOAL = OBJECTIVES["accuracy"]
LABELS = ("true", "false")


def predictions(margins: list[float], gold: list[str]) -> list[Prediction]:
    """Answers `true` where the margin is above 0."""
    rows = []
    for n, (margin, answer) in enumerate(zip(margins, gold, strict=True)):
        chosen = LABELS[0] if margin > 0 else LABELS[1]
        rows.append(
            Prediction(
                index=n, prompt="", answer=answer, generation=chosen, correct=chosen == answer,
                log_probability=-1.0, answer_tokens=1, rank=1, token_f1=1.0,
                choice_log_probabilities=(margin, 0.0),
            )
        )  # fmt: skip
    return rows


@pytest.fixture
def world() -> tuple[list[float], list[str], random.Random]:
    """Margins that know little, with a label prior that is off: 400 questions, 60 % `true`."""
    noise = random.Random(0)
    gold = [LABELS[0] if noise.random() < 0.6 else LABELS[1] for _ in range(400)]
    margins = [(0.4 if g == "true" else -0.4) + noise.gauss(0, 1) - 1.5 for g in gold]
    return margins, gold, noise


def found(before: list[Prediction], after: list[Prediction], luck: float | None = None) -> Any:
    comparison = {**compared(before, after, 0), "asked": True}
    selection = None if luck is None else {"gain_without": luck}
    return verdict(comparison, selection, guards_of(before, after), GOAL)


def test_a_shifted_prior_is_called_so(world: Any) -> None:
    margins, gold, _ = world
    before = predictions(margins, gold)
    after = predictions([m + 1.5 for m in margins], gold)
    guards = guards_of(before, after)
    assert guards is not None
    accuracy = 100 * sum(row.correct for row in after) / len(after)
    assert guards["prior_alone"] == pytest.approx(accuracy, abs=1.5)
    assert guards["majority"] == pytest.approx(100 * gold.count("true") / 400)
    said = found(before, after)
    assert said["found"] == "better"
    assert said["shifted_prior"]
    assert "shifted label prior" in said["sentence"]


def test_a_gain_by_knowledge_is_not_called_a_shifted_prior(world: Any) -> None:
    margins, gold, _ = world
    before = predictions([m + 1.5 for m in margins], gold)
    after = predictions([m + 1.5 + (1.0 if g == "true" else -1.0)
                         for m, g in zip(margins, gold, strict=True)], gold)  # fmt: skip
    said = found(before, after)
    assert said["found"] == "better"
    assert not said["shifted_prior"]


def test_noise_is_no_better_or_not_known(world: Any) -> None:
    margins, gold, noise = world
    before = predictions(margins, gold)
    for _ in range(20):
        after = predictions([m + noise.gauss(0, 0.1) for m in margins], gold)
        change = sum(bool(a.correct) - bool(b.correct) for a, b in zip(after, before, strict=True))
        said = found(before, after)
        assert said["found"] == ("no better" if change <= 0 else "not known") or said["p"] <= 0.05
    worse = predictions([m - 3 for m in margins], gold)
    assert found(before, worse)["found"] == "no better"


def test_a_gain_that_selection_explains_is_not_known(world: Any) -> None:
    margins, gold, _ = world
    before = predictions(margins, gold)
    after = predictions([m + 1.5 for m in margins], gold)
    assert found(before, after, luck=1.0)["found"] == "better"
    said = found(before, after, luck=-0.5)
    assert said["found"] == "not known"
    assert "selection alone is worth its gain" in said["sentence"]


def test_balanced_accuracy_and_shares_by_hand() -> None:
    gold = ["true", "true", "true", "false"]
    before = predictions([1, 1, -1, 1], gold)
    guards = guards_of(before, before)
    assert guards is not None
    assert guards["majority"] == 75
    assert guards["original"]["balanced_accuracy"] == pytest.approx(100 * (2 / 3 + 0) / 2)
    assert guards["original"]["shares"] == {"true": 0.75, "false": 0.25}


def test_answers_that_are_no_few_labels_have_no_guards() -> None:
    gold = ["true"] * 4
    assert guards_of(predictions([1] * 4, gold), predictions([1] * 4, gold)) is None
