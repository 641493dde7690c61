"""Stackings of matrices that read the same input, concatenated along their rows.

`rows-q-k` is (rows of q + rows of k, D); its low-rank approximation has one input factor for both.

Shapes: I rows of one matrix, D model width.
"""

from collections.abc import Sequence
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from tensorllm.errors import UserError
from tensorllm.tensors.stacking import MATRIX, STACKINGS, Geometry, Stacking

READERS = (("q", "q_a", "k", "kv_a", "v"), ("in", "gate"))  # roles that read the same input
NARROWED = (("in", "gate", "out"), ("in", "out"))  # roles whose rows are the same channels


def reading_together(roles: Sequence[str]) -> list[tuple[str, ...]]:
    """The roles grouped by the input they read, in the order in which a layer runs."""
    attention, ffn = (tuple(r for r in readers if r in roles) for readers in READERS)
    order = (attention, ("q_b",), ("kv_b",), ("o",), ffn, ("out",))
    found = [keys for keys in order if set(keys) & set(roles)]
    by_owner: dict[str, list[str]] = {}  # shared experts, each routed expert
    for role in roles:
        owner, _, kind = role.rpartition(".")
        if owner:
            by_owner.setdefault(owner, []).append(kind)
    for owner, kinds in by_owner.items():
        found += [tuple(f"{owner}.{k}" for k in keys) for keys in reading_together(kinds)]
    return found


def rows_stacking(roles: Sequence[str]) -> str:
    """The name of the stacking of these roles; `matrix` for a single role."""
    return "matrix" if len(roles) == 1 else "-".join(("rows", *roles))


def _stack(w_ID: Sequence[Tensor], geometry: Geometry) -> Tensor:
    return torch.cat(list(w_ID))


def _unstack(roles: tuple[str, ...], w_ID: Tensor, geometry: Geometry, count: int) -> list[Tensor]:
    return list(w_ID.split([geometry.inner(role) for role in roles]))


def _check(roles: tuple[str, ...], given: Sequence[str], geometry: Geometry) -> None:
    if tuple(given) != roles:
        raise UserError(f"{rows_stacking(roles)} stacks the roles {roles}, got {tuple(given)}")


_GROUPS = [
    roles
    for readers in READERS
    for size in range(2, len(readers) + 1)
    for roles in combinations(readers, size)
]
ROWS_STACKINGS = tuple(map(rows_stacking, _GROUPS))
CHANNEL_STACKINGS = tuple(map(rows_stacking, NARROWED))
for _roles in (*_GROUPS, *NARROWED):
    STACKINGS.register(rows_stacking(_roles))(
        Stacking(_stack, partial(_unstack, _roles), partial(_check, _roles), MATRIX)
    )
