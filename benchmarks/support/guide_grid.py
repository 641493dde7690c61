"""Every point of a search's grid examined in full: what `guide.py` holds predictions against."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tensorllm.evaluation.predictions import Prediction
from tensorllm.io import Journal
from tensorllm.search.space import Point
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


def examined(study: Study, points: Sequence[Point], folder: Path) -> dict[str, Examined]:
    """The original and all points, by key; what `folder` has of an earlier run is not run again."""
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder, "grid")
    known = {key: Examined(*figures) for key, figures in journal.records()}
    for point in (None, *points):
        key = ORIGINAL if point is None else point.key
        if key not in known:
            known[key] = examine(study, point)
            journal.append([(key, known[key])])
            print(len(known), key, *(f"{x:.4g}" for x in known[key]), flush=True)
    return {key: known[key] for key in (ORIGINAL, *(point.key for point in points))}


def examine(study: Study, point: Point | None) -> Examined:
    """One point, none of its examples left out."""
    started = time.process_time()
    edit = study.examiner.edit(point)
    rows = study.examiner.predictions(edit)
    return Examined(
        accuracy=100 * mean([bool(row.correct) for row in rows]),
        loss=mean([row.loss for row in rows]),
        chosen=mean([among_choices(study, row) for row in rows]),
        error=max((site.relative_error for site in edit.sites), default=0.0),
        saved=sum(site.before - site.after for site in edit.sites),
        seconds=time.process_time() - started,
    )


def among_choices(study: Study, row: Prediction) -> float:
    """The right answer's cross-entropy among the choices, in nats."""
    if not row.choice_log_probabilities:
        return row.loss
    log_p = torch.tensor(row.choice_log_probabilities, dtype=torch.float64).log_softmax(0)
    (example,) = (e for e in study.datasets[0].validation.examples if e.index == row.index)
    return -float(log_p[example.choices.index(row.answer)])


def mean(values: Sequence[Any]) -> float:
    return float(sum(values)) / len(values)
