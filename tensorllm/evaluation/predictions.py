"""An example's scoring result, and the parquet table of many."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tensorllm.data.example import Example
from tensorllm.errors import UserError, first_line
from tensorllm.evaluation.matching import token_f1


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
    table = pa.Table.from_pylist([asdict(p) for p in predictions], schema)
    with path.open("wb") as file:  # Python opens any name
        pq.write_table(table, file)


def read_predictions(path: Path) -> list[Prediction]:
    """Read the table that `write_predictions` wrote.

    Raises:
        UserError: it is damaged or does not exist.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as file:
            return [prediction_of(values) for values in pq.read_table(file).to_pylist()]
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
        raise UserError(
            f"{path} is not a table of predictions: {first_line(error)[:120]}"
        ) from None
