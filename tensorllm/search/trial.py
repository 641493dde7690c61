"""The result of a trial: its figures and its verdicts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tensorllm.evaluation.predictions import Prediction


@dataclass(frozen=True, slots=True)
class TrialResult:
    """The figures of one compression, or of the original, on the validation examples.

    Attributes:
        accuracy: per cent of the examples seen; None for running text.
        loss: nats per token, mean over the examples seen.
        seen: examples examined.
        stopped: pruned before the last example, as it had lost.
        ratio: numbers in the decomposed matrices over numbers stored for them.
        parameters_saved: numbers that the model has fewer.
        relative_error: the largest of the sites'.
        correct: verdicts in the order of examination, as a hexadecimal number (first one lowest).
        seconds: of the whole trial.
    """

    accuracy: float | None
    loss: float
    seen: int
    stopped: bool
    ratio: float
    parameters_saved: int
    relative_error: float
    correct: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def result_of(
    rows: Sequence[Prediction],
    stopped: bool,
    ratio: float,
    saved: int,
    error: float,
    seconds: float,
) -> TrialResult:
    """The figures of these rows; a loss that is not finite is an error."""
    asked = rows[0].correct is not None
    loss = sum(row.loss for row in rows) / len(rows)
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise FloatingPointError(f"the model's loss is {loss}")
    return TrialResult(
        accuracy=100 * sum(bool(row.correct) for row in rows) / len(rows) if asked else None,
        loss=loss,
        seen=len(rows),
        stopped=stopped,
        ratio=ratio,
        parameters_saved=saved,
        relative_error=error,
        correct=pack([bool(row.correct) for row in rows]) if asked else "",
        seconds=seconds,
    )


def pack(verdicts: Sequence[bool]) -> str:
    """Verdicts as a hexadecimal number, the first one its lowest bit."""
    return f"{sum(1 << i for i, verdict in enumerate(verdicts) if verdict):x}"


def unpack(text: str, count: int) -> tuple[bool, ...]:
    """The verdicts that `pack` made this of."""
    number = int(text or "0", 16)
    return tuple(bool(number >> i & 1) for i in range(count))
