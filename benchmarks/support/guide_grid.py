"""Every point of a search's grid examined in full: what `guide.py` holds predictions against."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tensorllm.evaluation.predictions import Prediction
from tensorllm.io import Journal
from tensorllm.search.examiner import Examiner, sizes
from tensorllm.search.space import Point
from tensorllm.search.staged import DatasetExamples
from tensorllm.search.study import Study

ORIGINAL = "original"


class Examined(NamedTuple):
    """One point on the validation examples.

    Attributes:
        accuracy: per cent.
        loss: nats per token of the right answer.
        chosen: nats of the right answer among the choices (cross-entropy), which is what a guide's
            gradient is of; where there are no choices the loss.
        error: of the matrices, relative.
        saved: numbers that the model has fewer.
        seconds: CPU seconds of this point.
    """

    accuracy: float
    loss: float
    chosen: float
    error: float
    saved: int
    seconds: float

    @property
    def order(self) -> tuple[float, float, int]:
        """The best one first, as a search has it."""
        return -self.accuracy, self.loss, -self.saved


def examined(
    study: Study, points: Sequence[Point], folder: Path, part: str = "validation"
) -> dict[str, Examined]:
    """The original and all points on a part of the dataset, by key; what `folder` has of an earlier
    run is not run again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder, "grid" if part == "validation" else part)
    known = {key: Examined(*figures) for key, figures in journal.records()}
    examiner, data = examiner_of(study, part), getattr(study.datasets[0], part)
    gold = {e.index: e.choices.index(e.answer) for e in data.examples if e.choices}
    for point in (None, *points):
        key = ORIGINAL if point is None else point.key
        if key not in known:
            known[key] = examine(examiner, point, gold)
            journal.append([(key, known[key])])
            print(part, len(known), key, *(f"{x:.4g}" for x in known[key]), flush=True)
    return {key: known[key] for key in (ORIGINAL, *(point.key for point in points))}


def examiner_of(study: Study, part: str) -> Examiner:
    """The search's own, or one for its test part, which a search does not look at so."""
    if part == "validation":
        return study.examiner
    data = getattr(study.datasets[0], part)
    return Examiner(
        study.model,
        study.tokenizer,
        [DatasetExamples(data.examples, data.max_new_tokens)],
        study.protocol,
        points=[study.space.point(values) for values in study.feasible],
        budget=study.cache_budget,
    )


def examine(examiner: Examiner, point: Point | None, gold: Mapping[int, int]) -> Examined:
    """One point, none of its examples left out.

    Args:
        gold: of each example with choices the right one's number.
    """
    started = time.process_time()
    edit = examiner.edit(point)
    rows = examiner.predictions(edit)
    size = sizes(edit)
    return Examined(
        accuracy=100 * mean([bool(row.correct) for row in rows]),
        loss=mean([row.loss for row in rows]),
        chosen=mean([among_choices(row, gold) for row in rows]),
        error=size.relative_error,
        saved=size.parameters_saved,
        seconds=time.process_time() - started,
    )


def among_choices(row: Prediction, gold: Mapping[int, int]) -> float:
    """The right answer's cross-entropy among the choices, in nats."""
    if row.index not in gold:
        return row.loss
    log_p = torch.tensor(row.choice_log_probabilities, dtype=torch.float64).log_softmax(0)
    return -float(log_p[gold[row.index]])


def mean(values: Sequence[Any]) -> float:
    return float(sum(values)) / len(values)
