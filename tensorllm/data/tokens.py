"""Tokenise text for a causal model to continue.

Some tokenizers end every text with a special token (`add_eos_token`, or that of an encoder). It is
removed here: otherwise answers and generations would follow the end of the text.
"""

from collections.abc import Sequence
from typing import Any

from tensorllm.errors import UserError, first_line

PROBE = "a"


def open_ended(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of each text with leading special tokens, but without trailing ones."""
    if not texts:
        return []
    for text in texts:
        check_characters(text, "the text")
    ids: list[list[int]] = tokenizer(list(texts), verbose=False).input_ids
    closing = closing_tokens(tokenizer)
    if not closing:
        return ids
    return [_without(row, closing) for row in ids]


def as_messages(tokenizer: Any, texts: Sequence[str], whose: str) -> list[list[int]]:
    """Tokens of each text as a user's message, up to where the answer begins, by the chat template.

    Args:
        whose: the model's name in an error.

    Raises:
        UserError: the tokenizer has no chat template, or one that fails.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{whose} has no chat template: generate without --chat")
    messages = [[{"role": "user", "content": text}] for text in texts]
    try:
        return [
            list(tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False))
            for m in messages
        ]
    except Exception as error:  # a template is a program, and may raise anything
        raise UserError(f"the chat template of {whose} fails: {first_line(error)}") from None


def check_characters(text: str, whose: str) -> None:
    """Refuse half of a surrogate pair, which JSON can write and no tokenizer reads.

    Args:
        whose: what the message calls the text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.end + 20]
        raise UserError(
            f"{whose} holds half of a character (a lone surrogate): {around!r}"
        ) from None


def closing_tokens(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer appends to every text; tried, as no attribute tells."""
    bare = list(tokenizer(PROBE, add_special_tokens=False, verbose=False).input_ids)
    whole = list(tokenizer(PROBE, verbose=False).input_ids)
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return whole[start + len(bare) :]
    return []


def check_ids(sequences: Sequence[Sequence[int]], rows: int, whose: str) -> None:
    """Refuse tokens for which the model has no embedding.

    Args:
        rows: number of embeddings.
        whose: the name in the message for what was tokenised.
    """
    top = max((max(row) for row in sequences if row), default=-1)
    if top >= rows:
        raise UserError(
            f"{whose} has token {top}, but the model has embeddings of 0..{rows - 1}: the "
            "tokenizer is not this model's, or has tokens added to it"
        )


def _without(ids: list[int], closing: list[int]) -> list[int]:
    return ids[: -len(closing)] if ids[-len(closing) :] == closing else ids
