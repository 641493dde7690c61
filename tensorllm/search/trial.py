"""The result of a trial: its figures and its verdicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

from tensorllm.evaluation.predictions import Prediction


class EditSizes(NamedTuple):
    """How a compression changes the size of the matrices, and how exact it is.

    Attributes:
        ratio: numbers in the decomposed matrices over numbers stored for them.
        parameters_saved: by how many numbers the model gets smaller.
        relative_error: the largest of the sites'.
    """

    ratio: float
    parameters_saved: int
    relative_error: float


@dataclass(frozen=True, slots=True)
class TrialResult:
    """The figures of one compression, or of the original, on the validation examples.

    Over several datasets accuracy and loss are means over the datasets examined so far, and
    `parts` has the result on each.

    Attributes:
        accuracy: per cent of the examples seen; None for running text.
        loss: nats per token, mean over the examples seen.
        seen: examples examined.
        stopped: whether the trial was pruned before its last example.
        ratio: numbers in the decomposed matrices over numbers stored for them.
        parameters_saved: by how many numbers the model gets smaller.
        relative_error: the largest of the sites'.
        correct: verdicts in the order of examination, as a hexadecimal number (first one lowest).
        seconds: of the whole trial.
        parts: over several datasets the result on each; None if the trial was pruned before it.
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
    parts: tuple["TrialResult | None", ...] = ()

    def to_json(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        parts = [part and part.to_json() for part in found.pop("parts")]
        return found | ({"parts": parts} if parts else {})

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        parts = (None if part is None else cls.from_json(part) for part in found.get("parts", ()))
        return cls(**{**found, "parts": tuple(parts)})


def result_of(
    rows: Sequence[Prediction], stopped: bool, sizes: EditSizes, seconds: float
) -> TrialResult | None:
    """The figures of these rows; None if there are none.

    Raises:
        FloatingPointError: the mean loss is not finite.
    """
    if not rows:
        return None
    asked = rows[0].correct is not None
    loss = sum(row.loss for row in rows) / len(rows)
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise FloatingPointError(f"the model's loss is {loss}")
    return TrialResult(
        accuracy=100 * sum(bool(row.correct) for row in rows) / len(rows) if asked else None,
        loss=loss,
        seen=len(rows),
        stopped=stopped,
        **sizes._asdict(),
        correct=pack([bool(row.correct) for row in rows]) if asked else "",
        seconds=seconds,
    )


def together(parts: Sequence[TrialResult | None]) -> TrialResult:
    """Combine the results on all datasets into one; at least one dataset was examined."""
    there = [part for part in parts if part is not None]
    if len(parts) == 1:
        return there[0]
    known = [part.accuracy for part in there if part.accuracy is not None]
    return replace(
        there[0],
        accuracy=sum(known) / len(known) if known else None,
        loss=sum(part.loss for part in there) / len(there),
        seen=sum(part.seen for part in there),
        correct="",
        parts=tuple(parts),
    )


def pack(verdicts: Sequence[bool]) -> str:
    """Verdicts as a hexadecimal number; the first one is the lowest bit."""
    return f"{sum(1 << i for i, verdict in enumerate(verdicts) if verdict):x}"


def unpack(text: str, count: int) -> tuple[bool, ...]:
    """The inverse of `pack`, for `count` verdicts."""
    number = int(text or "0", 16)
    return tuple(bool(number >> i & 1) for i in range(count))
