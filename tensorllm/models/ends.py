"""Where a generated text ends.

Shapes: B texts, T tokens so far.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

AROUND = 32  # characters over which a token may change how its neighbours are written
BROKEN = "\ufffd"  # written for bytes that are not a whole character
BYTES = 4  # of a character, at most


class Ends(StoppingCriteria):
    """Ends a text where it holds one of some strings.

    transformers' own criterion compares the strings with the whole vocabulary anew for each
    request, and needs a tokenizer that can encode any text.

    It is asked after each token, and reads only as much of a text's end as a string can newly
    stand in: the time for a text is linear in its length.
    """

    def __init__(self, strings: str | Sequence[str], tokenizer: Any, read: int) -> None:
        self.strings = [strings] if isinstance(strings, str) else strings
        self.tokenizer = tokenizer
        self.read = read  # tokens of the prompt, which may hold the strings
        self.enough = max(map(len, self.strings), default=0) + AROUND

    def __call__(self, input_ids: Tensor, scores: Any, **rest: Any) -> Tensor:
        """Whether the last token ends each text (B,) of tokens (B, T)."""
        ended = [self.reached(ids) for ids in input_ids[:, self.read :]]
        return torch.tensor(ended, device=input_ids.device)

    def reached(self, ids: Tensor) -> bool:
        """Whether the last of these tokens (T,) after the prompt completes one of the strings."""
        if not self.strings:
            return False
        # How the end reads may depend on what stands before, so that the whole text decides.
        return self._found_in(self._end_of(ids)) and self._found_in(self._text(ids))

    def _found_in(self, text: str) -> bool:
        return any(string in text for string in self.strings)

    def _text(self, ids: Tensor) -> str:
        return str(self.tokenizer.decode(ids.tolist()))

    def _end_of(self, ids: Tensor) -> str:
        """The end of a text, long enough to hold whatever string its last token completes."""
        if any(BROKEN in string for string in self.strings):  # how far these reach is not known
            return self._text(ids)
        kept = self.enough
        while len(text := self._text(ids[-kept:])) < self.enough and kept < len(ids):
            kept *= 2  # tokens may be parts of a character, or stand for nothing
        # A run of tokens for single bytes is written only as a whole, so that it must not begin
        # within a character.
        for more in range(1, BYTES):
            if not text.startswith(BROKEN):
                break
            text = self._text(ids[-kept - more :])
        return text
