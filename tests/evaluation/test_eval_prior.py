"""A planted prior for a label is taken out; the loss stays; without shared choices: refused."""

import numpy as np
import pytest

from tensorllm.data.example import Example
from tensorllm.errors import UserError
from tensorllm.evaluation.predictions import chosen_prediction
from tensorllm.evaluation.prior import shared_choices, without_prior

CHOICES = ("true", "false", "maybe")


def rows(bonus: np.ndarray, count: int = 300):
    """Noisy scores of three labels, and a bonus that has nothing to do with the question."""
    rng = np.random.default_rng(0)
    out = []
    for n in range(count):
        gold = n % 3
        scores = rng.normal(size=3) + 1.5 * np.eye(3)[gold] + bonus
        scores -= np.logaddexp.reduce(scores) + 1.0  # choices are not all that could be said
        example = Example("q", CHOICES[gold], CHOICES, index=n)
        out.append(
            chosen_prediction(example, scores.tolist(), answer_tokens=1, rank=1, truncated=0)
        )
    return out


def accuracy(predictions) -> float:
    return sum(row.correct for row in predictions) / len(predictions)


def test_a_planted_prior_is_taken_out():
    fair, biased = rows(np.zeros(3)), rows(np.array([3.0, 0.0, -2.0]))
    assert accuracy(biased) < accuracy(fair) - 0.2
    found = without_prior(biased, CHOICES)
    assert accuracy(found) == pytest.approx(accuracy(fair), abs=0.03)
    shares = [sum(row.generation == c for row in found) / len(found) for c in CHOICES]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.06)
    assert [row.loss for row in found] == [row.loss for row in biased]


def test_a_tie_is_no_right_answer():
    even = [
        chosen_prediction(
            Example("q", "true", CHOICES), [-1.0] * 3, answer_tokens=1, rank=1, truncated=0
        )
        for _ in range(12)
    ]
    assert accuracy(without_prior(even, CHOICES)) == 0


@pytest.mark.parametrize(
    ("examples", "said"),
    [
        ([Example("q", "a", CHOICES)] * 9, "needs 10 questions or more, got 9"),
        ([Example("q", "a")] * 20, "all have the same choices"),
        ([Example("q", "true", CHOICES), Example("q", "a", ("a", "b"))] * 10, "the same choices"),
    ],
)
def test_what_has_no_prior(examples, said):
    with pytest.raises(UserError, match=said):
        shared_choices(examples)
