"""What is known of one example after it was scored; also a row of predictions.parquet."""

from dataclasses import dataclass


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
