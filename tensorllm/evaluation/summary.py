"""From rows to figures."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tensorllm.evaluation.row import Row
from tensorllm.metrics import answer_metrics


def columns(rows: Sequence[Row]) -> dict[str, Tensor]:
    """What the metrics read, as float64 columns; NaN where a row has no question."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    asked = [row.correct is not None for row in rows]
    return {
        "correct": column([float(r.correct) if r.correct is not None else math.nan for r in rows]),
        "log_probability": column([r.log_probability for r in rows]),
        "answer_tokens": column([r.answer_tokens for r in rows]),
        "rank": column([r.rank if a else math.nan for r, a in zip(rows, asked, strict=True)]),
        "token_f1": column(
            [r.token_f1 if a else math.nan for r, a in zip(rows, asked, strict=True)]
        ),
    }


def metrics_of(rows: Sequence[Row]) -> dict[str, float]:
    """All metrics of these rows; those that do not apply are left out."""
    metrics = answer_metrics(sync_on_compute=False)  # these rows, and no other process's
    metrics.update(**columns(sorted(rows, key=lambda row: row.index)))
    found = {name: float(value) for name, value in metrics.compute().items()}
    return {name: value for name, value in found.items() if not math.isnan(value)}
