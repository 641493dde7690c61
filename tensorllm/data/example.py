"""An example of a dataset, whatever its source."""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Example:
    """One question and its gold answer.

    Attributes:
        prompt: what the model reads. For a masked model it may contain the tokenizer's mask token
            once, where the answer belongs; otherwise the answer follows the prompt.
        answer: the gold answer; one of `choices` if there are any.
        choices: if given, each is scored by its log-probability; if empty, an answer is generated
            and matched.
        index: the example's place in its dataset, before a part of it was chosen; unique.
        tokens: for running text only: the token ids that are scored, in place of prompt and answer.
    """

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    index: int = 0
    tokens: tuple[int, ...] = ()


class Workload(NamedTuple):
    """How much an experiment on a dataset reads.

    Attributes:
        examples: in all splits, as LASER's appendix counts them (arXiv 2312.13558).
        prompt_tokens, answer_tokens: means over real rows, by GPT-2's tokenizer (which GPT-J and
            RoBERTa share).
    """

    examples: int
    prompt_tokens: float
    answer_tokens: float
