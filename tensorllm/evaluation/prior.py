"""Answers with the model's prior for each choice removed.

Shapes: N questions, C choices of each.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tensorllm.data.example import Example
from tensorllm.errors import UserError
from tensorllm.evaluation.matching import token_f1
from tensorllm.evaluation.predictions import Prediction

FEWEST = 10  # questions; a prior estimated from fewer is noise


def without_prior(predictions: Sequence[Prediction], choices: Sequence[str]) -> list[Prediction]:
    """Choose again after subtracting each choice's mean log-probability over the questions.

    This mean, which needs no labels, is the model's prior for a choice: batch calibration, arXiv
    2309.17249, section 3. The chosen answers and verdicts change; log-probabilities and the loss
    stay.

    Args:
        choices: of every question, in the order of the log-probabilities.
    """
    scores_NC = np.array([row.choice_log_probabilities for row in predictions], np.float64)
    # Only the differences between a question's choices matter.
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
    """The choices that all questions have in common.

    Raises:
        UserError: the questions' choices differ, or they are too few to estimate a prior.
    """
    if len(examples) < FEWEST:
        raise UserError(f"--calibrate-prior needs {FEWEST} questions or more, got {len(examples)}")
    choices = {example.choices for example in examples}
    if len(choices) > 1 or choices == {()}:
        raise UserError(
            "--calibrate-prior is for questions that all have the same choices, as fever's do"
        )
    return choices.pop()
