"""Where a generated text ends.

Shapes: B texts, T tokens so far.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class Ends(StoppingCriteria):
    """Ends a text where it holds one of some strings.

    transformers' own criterion compares the strings with the whole vocabulary anew for each
    request, and needs a tokenizer that can encode any text.
    """

    def __init__(self, strings: str | Sequence[str], tokenizer: Any, read: int) -> None:
        self.strings = [strings] if isinstance(strings, str) else strings
        self.tokenizer = tokenizer
        self.read = read  # tokens of the prompt, which may hold the strings

    def __call__(self, input_ids: Tensor, scores: Any, **rest: Any) -> Tensor:
        """Whether each text (B,) of tokens (B, T) has ended."""
        ended = [self.reached(ids) for ids in input_ids[:, self.read :].tolist()]
        return torch.tensor(ended, device=input_ids.device)

    def reached(self, ids: list[int]) -> bool:
        """Whether these tokens after the prompt hold one of the strings."""
        if not self.strings:
            return False
        text = self.tokenizer.decode(ids)
        return any(string in text for string in self.strings)
