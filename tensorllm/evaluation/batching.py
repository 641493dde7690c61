"""Form batches of items of similar length that fit in memory."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import TypeVar

import torch

from tensorllm.errors import Incomplete, UserError
from tensorllm.evaluation.encoding import Encoded
from tensorllm.evaluation.masked import MaskedItem
from tensorllm.evaluation.predictions import Prediction
from tensorllm.models.scores import CAUSE

T = TypeVar("T", Encoded, MaskedItem)
Item = TypeVar("Item")

log = logging.getLogger(__name__)

LOGITS = 2**26  # numbers in one batch's logits: 256 MiB in float32


def fill(
    items: Sequence[T], cost: Callable[[T], tuple[int, int]], tokens: int, together: int = 1
) -> Iterator[list[T]]:
    """Batch items of similar cost, the most expensive first, so that memory errors show at once.

    Args:
        items: in the dataset's order.
        cost: an item's tokens and logits; a batch costs its number of items times its dearest one.
        tokens: the budget of tokens per batch.
        together: size of the groups of consecutive indices that stay in one batch, in order.
    """
    size = max(1, together)
    grouped = groupby(items, key=lambda item: item.example.index // size)
    groups = [_measured(group, cost) for _, group in grouped]
    groups.sort(key=lambda group: group[1], reverse=True)
    batch: list[T] = []
    dearest = (0, 0)
    for group, costs in groups:
        worse = (max(dearest[0], costs[0]), max(dearest[1], costs[1]))
        rows = len(batch) + len(group)
        if batch and (rows * worse[0] > tokens or rows * worse[1] > LOGITS):
            yield batch
            batch, worse = [], costs
        batch += group
        dearest = worse
    if batch:
        yield batch


def _measured(
    group: Iterable[T], cost: Callable[[T], tuple[int, int]]
) -> tuple[list[T], tuple[int, int]]:
    """The items, and the largest number of tokens and of logits among them."""
    items = list(group)
    tokens, logits = zip(*map(cost, items), strict=True)
    return items, (max(tokens), max(logits))


def halving(
    scored: Callable[[Sequence[Item]], list[Prediction]], items: Sequence[Item]
) -> list[Prediction]:
    """`scored(items)`; where memory runs out, each half by itself.

    Raises:
        Incomplete: one item alone does not fit memory.
        UserError: the model's loss is not finite.
    """
    try:
        return finite(scored(items))
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        if len(items) == 1:
            raise Incomplete(f"out of memory for a single example: {str(error)[:120]}") from None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(items) // 2
    log.warning("out of memory: going on with %d instead of %d examples at once", half, len(items))
    return halving(scored, items[:half]) + halving(scored, items[half:])


def finite(rows: list[Prediction]) -> list[Prediction]:
    """Return the rows unchanged.

    Raises:
        UserError: the model's loss is not finite.
    """
    for row in rows:
        if not math.isfinite(row.log_probability):
            raise UserError(f"the model's loss is {row.loss} on example {row.index}: {CAUSE}")
    return rows


def _out_of_memory(error: RuntimeError) -> bool:
    # On a CPU torch raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)
