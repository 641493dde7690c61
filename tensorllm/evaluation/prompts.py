"""Read prompts efficiently: a shared beginning once, and a prompt's choices in one row.

Prompts are made from templates, so that the questions of a batch often begin with the same tokens.
In a causal model nothing after these tokens can change their activations: they are read as one row,
whose key-value cache all rows continue. A prompt's continuations follow it in the same row; each
one sees only the prompt and itself.

Shapes: B rows, T new tokens, S cached and new tokens, N columns with logits, V vocabulary.
"""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tensorllm.evaluation.encoding import Encoded, common_prefix
from tensorllm.evaluation.forward import ModelForward, Padded, left_padded

WORTH = 0.05  # least share of the batch's tokens to save: repeating the cache costs, too

Tokens = Sequence[int]


class Reading(NamedTuple):
    """The result of reading rows.

    Attributes:
        logits: of the last columns, (B, N, V), or (M, V) where each row has its own number of them.
        padded: the rows as they lie in the cache's columns, right-aligned.
        cache: the key-value cache, if it was to grow.
    """

    logits: Tensor
    padded: Padded
    cache: Any


def read(
    forward: ModelForward,
    sequences: Sequence[Tokens],
    *,
    keep: int | Sequence[int],
    apart: int,
    grow: bool = False,
    key: Hashable = None,
    branches: Sequence[Sequence[Tokens]] | None = None,
) -> Reading:
    """Read rows of tokens; see `ModelForward` for `keep`, `grow` and `key`.

    Args:
        sequences: tokens of each row.
        apart: how many leading tokens of the rows may be read separately from the rest.
        branches: continuations of each row, whose tokens follow it one after the other; only for
            models that obey such masks (`ModelForward.obeys_masks`).
    """
    rows, device = len(sequences), forward.device
    heads: Sequence[Sequence[Tokens]] = branches or [()] * rows
    columns = keep if isinstance(keep, int) else max(keep)
    within = columns - max(sum(map(len, of_row)) for of_row in heads)  # before the branches
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
    logits, cache = forward(padded, **how)
    return Reading(logits, whole, cache)


def branched(
    lengths: Sequence[int], heads: Sequence[Sequence[Tokens]], width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions (B, T) of rows that end in branches, and which columns each column sees (B, T, T).

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


Branches = list[list[list[int]]]  # per example and choice: tokens after the shared ones
Further = dict[tuple[int, int], list[float]]  # (example, choice) -> log-probabilities


def choice_scores(
    forward: ModelForward, items: Sequence[Encoded], key: Hashable
) -> list[tuple[list[float], int]]:
    """For each example every choice's log-probability, and the rank of the gold one's first token.

    Args:
        forward: the model.
        items: examples with choices.
        key: of the batch, see `ModelForward`.
    """
    branches = [[ids[e.shared :] for ids in e.full] for e in items]
    prompts = [e.full[0][: e.shared] for e in items]
    apart = min(map(len, prompts))
    longest = max(sum(len(b) - 1 for b in of_one) for of_one in branches)
    further: Further = {}
    if longest and forward.obeys_masks(max(map(len, prompts)) + longest):
        heads = [[b[:-1] for b in of_one] for of_one in branches]
        found = read(forward, prompts, keep=longest + 1, apart=apart, key=key, branches=heads)
        logits_BV, further = _side_by_side(found.logits, branches)
    else:
        found = read(forward, prompts, keep=1, apart=apart, grow=bool(longest), key=key)
        logits_BV = found.logits[:, -1]
        if longest:
            further = _one_by_one(forward, items, branches, found, key)
    return _summed(items, branches, logits_BV.float().log_softmax(-1), further)


def _summed(
    items: Sequence[Encoded], branches: Branches, log_BV: Tensor, further: Further
) -> list[tuple[list[float], int]]:
    """Add up each choice's tokens; tokens shared by all count only if they belong to the answer."""
    firsts = [[b[0] for b in of_one] for of_one in branches]
    width = max(map(len, firsts))
    index = torch.tensor([f + f[:1] * (width - len(f)) for f in firsts], device=log_BV.device)
    first = log_BV.gather(1, index).tolist()
    golds = [
        f[e.example.choices.index(e.example.answer)] for e, f in zip(items, firsts, strict=True)
    ]
    gold_B1 = log_BV.gather(1, torch.tensor(golds, device=log_BV.device)[:, None])
    ranks = ((log_BV > gold_B1).sum(1) + 1).tolist()
    out = []
    for i, e in enumerate(items):
        begins = max(0, e.start - e.shared - 1)
        out.append(
            (
                [
                    (first[i][c] if e.shared >= e.start else 0.0)
                    + sum(further.get((i, c), [])[begins:])
                    for c in range(len(firsts[i]))
                ],
                ranks[i],
            )
        )
    return out


def _side_by_side(logits_BNV: Tensor, branches: Branches) -> tuple[Tensor, Further]:
    """Logits after each prompt, and log-probabilities within the branches.

    The rows are those that end in all their branches.
    """
    columns = logits_BNV.shape[1]
    counts = [sum(len(b) - 1 for b in of_one) for of_one in branches]
    rows = torch.arange(len(branches), device=logits_BNV.device)
    before = torch.tensor([columns - 1 - n for n in counts], device=logits_BNV.device)
    ends = [[t for b in of_one for t in b[1:]] for of_one in branches]
    picked = _picked(logits_BNV, _left_padded_to(columns, ends).to(logits_BNV.device)).tolist()
    further: Further = {}
    for i, of_one in enumerate(branches):
        at = columns - counts[i]
        for c, branch in enumerate(of_one):
            further[i, c] = picked[i][at : at + len(branch) - 1]
            at += len(branch) - 1
    return logits_BNV[rows, before], further


def _left_padded_to(width: int, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Token lists as a rectangle of this width, padded on the left with zeros."""
    return torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in sequences])


def _one_by_one(
    forward: ModelForward,
    items: Sequence[Encoded],
    branches: Branches,
    found: Reading,
    key: Hashable,
) -> Further:
    """Log-probabilities within the branches, by separate passes: for models without such masks."""
    places = [(i, c) for i, of in enumerate(branches) for c, b in enumerate(of) if len(b) > 1]
    further: Further = {}
    size = max(len(items), len(places) // 4)  # the cache is repeated: not all choices at once
    for at in range(0, len(places), size):
        chunk = places[at : at + size]
        rows = torch.tensor([i for i, _ in chunk], device=forward.device)
        heads = [branches[i][c][:-1] for i, c in chunk]
        new = left_padded(heads, forward.device, [items[i].shared for i, _ in chunk])
        logits_BNV, _ = forward(
            new,
            keep=new.ids_BT.shape[1],
            mask_BS=torch.cat([found.padded.mask_BT[rows], new.mask_BT], 1),
            cache=found.cache,
            rows=rows,
            key=None if key is None else (key, at),
        )
        ends = left_padded([branches[i][c][1:] for i, c in chunk], forward.device).ids_BT
        for place, head, gain in zip(chunk, heads, _picked(logits_BNV, ends).tolist(), strict=True):
            further[place] = gain[len(gain) - len(head) :]
    return further


def _picked(logits_BNV: Tensor, ids_BN: Tensor) -> Tensor:
    """Log-probabilities of the given tokens, (B, N)."""
    values = logits_BNV.float()
    return values.gather(2, ids_BN[..., None])[..., 0] - values.logsumexp(-1)
