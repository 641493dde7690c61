"""Choices without the model's prior for them: what it says of any question is taken out.

Shapes: N questions, C choices of each.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tensorllm.data.example import Example
from tensorllm.errors import UserError
from tensorllm.evaluation.matching import token_f1
from tensorllm.evaluation.predictions import Prediction

FEWEST = 10  # questions; a prior of fewer is noise


def without_prior(predictions: Sequence[Prediction], choices: Sequence[str]) -> list[Prediction]:
    """The predictions as they are when each choice's mean log-probability is taken out.

    The mean over the questions, which needs no labels, is the model's prior for a choice: batch
    calibration, arXiv 2309.17249, section 3. What is chosen, and whether that is right, changes;
    log-probabilities and the loss stay.

    Args:
        choices: of every question, in the order of the log-probabilities.
    """
    scores_NC = np.array([row.choice_log_probabilities for row in predictions], np.float64)
    # Of a question itself only the differences between its choices are of interest.
    scores_NC -= np.logaddexp.reduce(scores_NC, axis=1, keepdims=True)
    scores_NC -= scores_NC.mean(0)
    out = []
    for row, scores_C in zip(predictions, scores_NC, strict=True):
        gold = choices.index(row.answer)
        chosen = choices[int(scores_C.argmax())]
        right = bool(scores_C[gold] > np.delete(scores_C, gold).max())
        f1 = token_f1(chosen, row.answer)
        out.append(replace(row, generation=chosen, correct=right, token_f1=f1))
    return out


def shared_choices(examples: Sequence[Example]) -> tuple[str, ...]:
    """The choices that all questions have.

    Raises:
        UserError: they do not have the same ones, or the questions are too few for a prior.
    """
    if len(examples) < FEWEST:
        raise UserError(f"--calibrate-prior needs {FEWEST} questions or more, got {len(examples)}")
    choices = {example.choices for example in examples}
    if len(choices) > 1 or choices == {()}:
        raise UserError(
            "--calibrate-prior is for questions that all have the same choices, as fever's do"
        )
    return choices.pop()
