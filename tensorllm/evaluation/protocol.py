"""What counts as a right answer: by the papers' scripts, and by a strict standard.

The scripts' quirks come from their source: github.com/pratyushasharma/laser,
`src/study_utils/metric_utils.py` and `src/intervention_*.py`; docs/protocols.md describes the
effect of each.
"""

from dataclasses import dataclass, fields

from tensorllm.errors import UserError
from tensorllm.registry import Registry


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """Which of the papers' quirks are kept. With all off it is the strict protocol.

    Attributes:
        name: as it stands in the results.
        search_prompt: the text that is searched for the answer includes the prompt.
        substring: the answer matches as a case-insensitive substring (`no` in `north`), instead of
            as whole words normalised as SQuAD does.
        masked_extra_token: a masked model's loss is divided by one token more than the answer has.
        masked_bare_loss: a masked model's loss is computed on text without its special tokens.
        unmasked_padding: the loss is computed in batches of so many examples, in the dataset's
            order, padded on the left with no attention mask; 0: padding is masked.
        single_token_choices: choices must be single tokens.
    """

    name: str = "strict"
    search_prompt: bool = False
    substring: bool = False
    masked_extra_token: bool = False
    masked_bare_loss: bool = False
    unmasked_padding: int = 0
    single_token_choices: bool = False

    def quirks(self) -> dict[str, bool | int]:
        """Every quirk by its name, on or off, for the results."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "name"}


PROTOCOLS: Registry[Protocol] = Registry("protocol")
STRICT = PROTOCOLS.register("strict")(Protocol())
PAPER = PROTOCOLS.register("paper")(
    Protocol(
        name="paper",
        search_prompt=True,
        substring=True,
        masked_extra_token=True,
        masked_bare_loss=True,
        unmasked_padding=16,
        single_token_choices=True,
    )
)


def require_single_tokens(choices: dict[str, int]) -> None:
    """Check that each choice is a single token, as the papers look up one token's probability.

    Args:
        choices: each choice's number of tokens.

    Raises:
        UserError: one is longer.
    """
    long = {choice: tokens for choice, tokens in choices.items() if tokens != 1}
    if long:
        lengths = ", ".join(f"{choice!r} is {tokens}" for choice, tokens in sorted(long.items()))
        raise UserError(
            f"protocol 'paper' needs choices of one token each, but with this tokenizer {lengths}; "
            "protocol 'strict' scores choices of any length"
        )
