"""What is known of one example after it was scored; also a row of predictions.parquet."""

from collections.abc import Sequence
from dataclasses import dataclass

from tensorllm.data.example import Example
from tensorllm.evaluation.matching import token_f1


@dataclass(frozen=True, slots=True)
class Row:
    """One example's result.

    Attributes:
        index: the example's place in its dataset.
        prompt, answer: as in the example.
        generation: the new text up to where the verdict was certain, or the chosen choice.
        correct: the verdict; None where there is no question (running text).
        log_probability: of the gold answer given the prompt, in nats.
        answer_tokens: by how many tokens it is divided for the loss.
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


def chosen_row(
    e: Example, sums: Sequence[float], *, answer_tokens: int, rank: int, truncated: int
) -> Row:
    """The row of a question with choices; a tie is no right answer.

    Args:
        sums: log-probability of each choice, in nats.
        answer_tokens: of the gold choice.
        rank: of its first token.
    """
    gold = e.choices.index(e.answer)
    others = [s for i, s in enumerate(sums) if i != gold]
    chosen = e.choices[max(range(len(sums)), key=sums.__getitem__)]
    return Row(
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
