"""The metrics of many predictions."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torchmetrics import MetricCollection

from tensorllm.evaluation.predictions import Prediction
from tensorllm.metrics import add_answers, answer_metrics


def columns(predictions: Sequence[Prediction]) -> dict[str, Tensor]:
    """The values that the metrics read, as float64 columns; NaN where there is no question."""

    def column(values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float64)

    def asked(values: Iterable[float]) -> Tensor:
        pairs = zip(predictions, values, strict=True)
        return column(math.nan if p.correct is None else value for p, value in pairs)

    return {
        "correct": asked(float(bool(p.correct)) for p in predictions),
        "log_probability": column(p.log_probability for p in predictions),
        "answer_tokens": column(p.answer_tokens for p in predictions),
        "rank": asked(p.rank for p in predictions),
        "token_f1": asked(p.token_f1 for p in predictions),
    }


def update(metrics: MetricCollection, predictions: Sequence[Prediction]) -> None:
    """Add predictions to the metrics, in the order of the dataset.

    Floating-point sums depend on their order: this way the same predictions give the same figures
    bit for bit, however they were batched.
    """
    ordered = sorted(predictions, key=lambda p: p.index)
    device = next(iter(metrics.values())).device
    add_answers(metrics, {name: values.to(device) for name, values in columns(ordered).items()})


def metrics_of(predictions: Sequence[Prediction]) -> dict[str, float]:
    """All metrics of these predictions; those that do not apply are left out."""
    metrics = answer_metrics(sync_on_compute=False)  # these alone, and no other process's
    update(metrics, predictions)
    found = {name: float(value) for name, value in metrics.compute().items()}
    return {name: value for name, value in found.items() if not math.isnan(value)}
