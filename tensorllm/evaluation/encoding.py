"""Examples as tokens for a causal model: shared prefix, branches, where the answer begins."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from tensorllm.data.example import Example
from tensorllm.data.tokens import open_ended
from tensorllm.errors import UserError

# Words at the end of a prompt: those before cannot change how the answer is tokenised.
TAIL_WORDS = 4


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example in tokens.

    Attributes:
        example: the example.
        prompt: tokens of the prompt alone, from which answers are generated.
        full: tokens of prompt and answer, one sequence per choice; without choices only the gold
            answer's.
        shared: how many leading tokens all of `full` have in common, at most up to `start`.
        start: where the answers begin in `full`.
        truncated: tokens cut from the prompt's beginning because the context cannot hold them.
    """

    example: Example
    prompt: list[int]
    full: tuple[list[int], ...]
    shared: int
    start: int
    truncated: int

    @property
    def length(self) -> int:
        return max(map(len, self.full))


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many leading items all sequences share."""
    return sum(
        1 for _ in takewhile(lambda items: len(set(items)) == 1, zip(*sequences, strict=False))
    )


class Encoder:
    """Tokenises examples in bulk; each distinct prompt ending and answer only once.

    Args:
        tokenizer: the model's.
        context: tokens that the model can read.
        max_new_tokens: the most tokens of a generated answer.

    Raises:
        UserError: `max_new_tokens` leaves no room in the context.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, context: int, max_new_tokens: int
    ) -> None:
        if max_new_tokens >= context:
            raise UserError(
                f"max_new_tokens must be below the model's context of {context} tokens, "
                f"got {max_new_tokens}"
            )
        self.tokenizer = tokenizer
        self.context = context
        self.max_new_tokens = max_new_tokens
        self._tails: dict[tuple[str, str], tuple[list[int], list[int], int]] = {}

    def __call__(self, examples: Sequence[Example]) -> list[Encoded]:
        prompts = self._ids([e.prompt for e in examples if not e.tokens])
        following = iter(prompts)
        return [
            self._running_text(e) if e.tokens else self._question(e, next(following))
            for e in examples
        ]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return open_ended(self.tokenizer, texts)

    def _running_text(self, example: Example) -> Encoded:
        tokens = list(example.tokens)
        if len(tokens) > self.context:
            raise UserError(
                f"blocks of text must be at most the model's context of {self.context} tokens, "
                f"got {len(tokens)}"
            )
        return Encoded(example, tokens[:1], (tokens,), 1, 1, 0)

    def _question(self, example: Example, prompt: list[int]) -> Encoded:
        prompt = prompt or self._beginning()
        answers = example.choices or (example.answer,)
        full, starts = zip(*(self._with(example.prompt, prompt, a) for a in answers), strict=True)
        start = max(1, min(starts))
        shared = max(1, min(common_prefix(full), *(len(ids) - 1 for ids in full), start))
        new = 0 if example.choices else self.max_new_tokens
        prompt, full, cut = self._fitted(prompt, full, shared, new)
        return Encoded(example, prompt, full, shared - cut, start - cut, cut)

    def _beginning(self) -> list[int]:
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return [token]
        raise UserError("an empty prompt needs a tokenizer with a bos or eos token")

    def _with(self, text: str, prompt: list[int], answer: str) -> tuple[list[int], int]:
        """Tokens of `text + " " + answer`, and the position where the answer begins."""
        tail = " ".join(text.split(" ")[-TAIL_WORDS:])
        if (tail, answer) not in self._tails:
            self._tails[tail, answer] = self._cut(tail, answer)
        before, after, length = self._tails[tail, answer]
        same = common_prefix((before, after))
        left = len(before) - same  # tokens at the prompt's end that the answer changes
        known = min(len(before), left + 2)
        if tail == text:
            ids = after
        elif prompt[len(prompt) - known :] == before[len(before) - known :]:
            ids = prompt[: len(prompt) - left] + after[same:]
        else:
            ids = self._ids([f"{text} {answer}"])[0]
        return ids, len(ids) - length

    def _cut(self, tail: str, answer: str) -> tuple[list[int], list[int], int]:
        before, after = self._ids([tail, f"{tail} {answer}"])
        # LASER's find_answer_len: the shortest ending that decodes to the answer.
        for length in range(1, len(after) + 1):
            if str(self.tokenizer.decode(after[-length:])).strip() == answer.strip():
                return before, after, length
        return before, after, max(1, len(after) - common_prefix((before, after)))

    def _fitted(
        self, prompt: list[int], full: tuple[list[int], ...], shared: int, new: int
    ) -> tuple[list[int], tuple[list[int], ...], int]:
        """Drop the first tokens that the context cannot hold; returns how many."""
        longest = max(len(prompt) + new, *map(len, full))
        cut = longest - self.context
        if cut <= 0:
            return prompt, full, 0
        special = set(self.tokenizer.all_special_ids)
        kept = sum(1 for _ in takewhile(special.__contains__, prompt))  # a bos token stays first
        if kept + cut >= min(shared, len(prompt)):
            raise UserError(
                f"the model's context of {self.context} tokens must hold prompt and answer,"
                f" got {longest} tokens of which only {shared} belong to the prompt"
            )
        shorter = [ids[:kept] + ids[kept + cut :] for ids in (prompt, *full)]
        return shorter[0], tuple(shorter[1:]), cut
