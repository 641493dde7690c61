"""An example's scoring result; the metrics of many, and their parquet table."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MetricCollection

from tensorllm.data.example import Example
from tensorllm.errors import UserError, first_line
from tensorllm.evaluation.matching import token_f1
from tensorllm.metrics import add_answers, answer_metrics


@dataclass(frozen=True, slots=True)
class Prediction:
    """One example's result; also a row of predictions.parquet.

    Attributes:
        index: the example's place in its dataset.
        prompt, answer: as in the example.
        generation: the new text up to where the verdict was certain, or the chosen choice.
        correct: the verdict; None where there is no question (running text).
        log_probability: of the gold answer given the prompt, in nats.
        answer_tokens: the number of tokens by which the loss is divided.
        rank: 1 if the answer's first token was the most probable of the vocabulary, 2 if the
            second, ...
        token_f1: of as many new tokens as the answer has, or of the chosen choice.
        choice_log_probabilities: of each choice, in nats.
        truncated: tokens of the prompt that did not fit the context.
    """

    index: int
    prompt: str
    answer: str
    generation: str
    correct: bool | None
    log_probability: float
    answer_tokens: int
    rank: int
    token_f1: float
    choice_log_probabilities: tuple[float, ...] = ()
    truncated: int = 0

    @property
    def loss(self) -> float:
        """Nats per answer token."""
        return -self.log_probability / self.answer_tokens


def chosen_prediction(
    e: Example, sums: Sequence[float], *, answer_tokens: int, rank: int, truncated: int
) -> Prediction:
    """The prediction for a question with choices; a tie counts as wrong.

    Args:
        e: the example.
        sums: log-probability of each choice, in nats.
        answer_tokens: of the gold choice.
        rank: of its first token.
        truncated: tokens of the prompt that did not fit the context.
    """
    gold = e.choices.index(e.answer)
    others = [s for i, s in enumerate(sums) if i != gold]
    chosen = e.choices[max(range(len(sums)), key=sums.__getitem__)]
    return Prediction(
        index=e.index,
        prompt=e.prompt,
        answer=e.answer,
        generation=chosen,
        correct=sums[gold] > max(others, default=float("-inf")),
        log_probability=sums[gold],
        answer_tokens=answer_tokens,
        rank=rank,
        token_f1=token_f1(chosen, e.answer),
        choice_log_probabilities=tuple(sums),
        truncated=truncated,
    )


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
    metrics = answer_metrics(sync_on_compute=False)  # this process only
    update(metrics, predictions)
    found = {name: float(value) for name, value in metrics.compute().items()}
    return {name: value for name, value in found.items() if not math.isnan(value)}


def prediction_of(values: dict[str, Any]) -> Prediction:
    """A prediction from its JSON or parquet form."""
    known = {field.name for field in fields(Prediction)}
    kept = {name: value for name, value in values.items() if name in known}
    return Prediction(
        **{**kept, "choice_log_probabilities": tuple(kept["choice_log_probabilities"])}
    )


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Write the predictions as a parquet table, one a row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("index", pa.int64()),
            ("prompt", pa.string()),
            ("answer", pa.string()),
            ("generation", pa.string()),
            ("correct", pa.bool_()),
            ("log_probability", pa.float64()),
            ("answer_tokens", pa.int64()),
            ("rank", pa.int64()),
            ("token_f1", pa.float64()),
            ("choice_log_probabilities", pa.list_(pa.float64())),
            ("truncated", pa.int64()),
        ]
    )
    pq.write_table(pa.Table.from_pylist([asdict(p) for p in predictions], schema), path)


def read_predictions(path: Path) -> list[Prediction]:
    """Read the table that `write_predictions` wrote.

    Raises:
        UserError: it is damaged or does not exist.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return [prediction_of(values) for values in pq.read_table(path).to_pylist()]
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
        raise UserError(
            f"{path} is not a table of predictions: {first_line(error)[:120]}"
        ) from None
