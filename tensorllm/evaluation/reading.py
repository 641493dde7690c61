"""How rows of tokens are read: what they begin with once, what they branch into side by side.

Prompts are made from templates, so that the questions of a batch often begin with the same tokens.
Nothing after them can change what a causal model makes of these: they are read as one row, whose
cache all rows continue. Several continuations of one prompt stand behind it in one row; each sees
the prompt and itself.

Shapes: B rows, T new tokens, S cached and new tokens, N columns with logits, V vocabulary.
"""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tensorllm.evaluation.encoding import common_prefix
from tensorllm.evaluation.forward import Forward, Padded, left_padded

WORTH = 0.05  # share of the batch's tokens that must be saved: repeating the cache costs, too

Tokens = Sequence[int]


class Reading(NamedTuple):
    """What reading rows gave.

    Attributes:
        logits_BNV: of the last columns.
        padded: the rows as they lie in the cache's columns, their last tokens in the last ones.
        cache: if it was to grow.
    """

    logits_BNV: Tensor
    padded: Padded
    cache: Any


def read(
    forward: Forward,
    sequences: Sequence[Tokens],
    *,
    keep: int,
    apart: int,
    grow: bool = False,
    key: Hashable = None,
    branches: Sequence[Sequence[Tokens]] | None = None,
) -> Reading:
    """Read rows of tokens; see `Forward` for `keep`, `grow` and `key`.

    Args:
        sequences: tokens of each row.
        apart: how many leading tokens of the rows may be read apart from the rest.
        branches: continuations of each row, whose tokens follow it one after the other; only for
            models that tell columns apart (`Forward.tells_apart`).
    """
    rows, device = len(sequences), forward.device
    heads: Sequence[Sequence[Tokens]] = branches or [()] * rows
    within = keep - max(sum(map(len, of_row)) for of_row in heads)  # columns before the branches
    shared = min(apart, min(map(len, sequences)) - within, common_prefix(sequences))
    if shared * (rows - 1) <= WORTH * sum(map(len, sequences)):
        shared = 0  # not worth it
    how: dict[str, Any] = {"keep": keep, "grow": grow, "key": key}
    rest = [list(ids[shared:]) for ids in sequences]
    flat = [
        ids + [t for head in of_row for t in head] for ids, of_row in zip(rest, heads, strict=True)
    ]
    padded = whole = left_padded(flat, device, [shared] * rows)
    if shared:
        first = left_padded([sequences[0][:shared]], device)
        first_key = None if key is None else (key, "beginning")
        how["cache"] = forward(first, keep=1, grow=True, key=first_key)[1]
        how["rows"] = torch.zeros(rows, dtype=torch.long, device=device)
        both = zip(first, padded, strict=True)
        whole = Padded(*(torch.cat([a.expand(rows, -1), b], 1) for a, b in both))
        how["mask_BS"] = whole.mask_BT
    if branches:
        places, sees_BTT = branched([len(ids) for ids in rest], heads, padded.ids_BT.shape[1])
        padded = padded._replace(positions_BT=torch.from_numpy(places + shared).to(device))
        seen_BTS = np.pad(sees_BTT, ((0, 0), (0, 0), (shared, 0)), constant_values=True)
        how["sees_BTS"] = torch.from_numpy(seen_BTS).to(device)
    logits_BNV, cache = forward(padded, **how)
    return Reading(logits_BNV, whole, cache)


def branched(
    lengths: Sequence[int], heads: Sequence[Sequence[Tokens]], width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of rows that end in branches: positions (B, T), and what each column sees (B, T, T).

    Args:
        lengths: tokens of each row before its branches.
        heads: the branches of each row.
        width: T; rows are padded on the left.
    """
    places = np.zeros((len(lengths), width), np.int64)
    branch = np.full((len(lengths), width), -1)  # 0: before the branches, -1: padding
    for row, (length, of_row) in enumerate(zip(lengths, heads, strict=True)):
        at = width - length - sum(map(len, of_row))
        places[row, at : at + length], branch[row, at : at + length] = np.arange(length), 0
        at += length
        for number, head in enumerate(of_row, 1):
            places[row, at : at + len(head)] = length + np.arange(len(head))
            branch[row, at : at + len(head)] = number
            at += len(head)
    seen = (branch[:, None] == 0) | (branch[:, None] == branch[:, :, None])
    return places, np.tril(seen & (branch[:, None] >= 0))
