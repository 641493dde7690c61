"""Putting the rows of pivoted factors, or what they make of tokens, in order, by the fastest way.

Shapes: N tokens, I features of each, R of them chosen, X = I - R mixed from these.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tensorllm.runtime.products import OWN_INSTRUCTIONS, speed_of
from tensorllm.runtime.sites import MOVE

# So many times as fast as copies products of 16 bits become here where they have instructions of
# their own. Not as measured: what is computed must not depend on how busy a machine is.
FASTER = 10


def can_write_in_place() -> bool:
    """Whether results may be written in place: no gradients are recorded, no compiler traces."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def as_rows(x: Tensor) -> Tensor:
    """(N, I): one token per row."""
    return x.reshape(-1, x.shape[-1])


def by_columns(x: Tensor) -> bool:
    """Whether the features of many tokens are put in order as columns, not transposed as rows.

    On a CPU columns of 32 bits take a third of the time, narrower ones longer than rows.
    """
    return can_write_in_place() and x.is_cpu and x.dtype is torch.float32


class Moves(NamedTuple):
    """How often numbers are copied to put the rows of a pivoted factor in order.

    Attributes:
        tokens: each feature of a token, if what is computed is put in order; transposing counts
            twice.
        factor: each number of the factor, if its rows are (`expanded`).
    """

    tokens: int
    factor: int

    def costs(self, features: int, rank: int, tokens: int, *, fast: bool) -> tuple[int, int]:
        """The cost of either way, in products: R^2 more for each token with the factor's rows.

        Args:
            features: I.
            rank: R.
            tokens: N.
            fast: whether products have instructions of their own.
        """
        copy = MOVE * (FASTER if fast else 1)
        by_rows = tokens * rank * rank + self.factor * copy * features * rank
        return self.tokens * copy * features * tokens, by_rows


def by_factor(x: Tensor, features: int, rank: int, moves: Moves) -> bool:
    """Whether to put the rows of a factor in order (`expanded`), not the features of tokens.

    Args:
        x: the tokens (..., features).
        features: I.
        rank: R.
        moves: what each way copies.
    """
    if not can_write_in_place():
        return False
    fast = not x.is_cpu or speed_of(x.dtype) > OWN_INSTRUCTIONS
    tokens = x.numel() // max(1, x.shape[-1])
    by_tokens, by_rows = moves.costs(features, rank, tokens, fast=fast)
    return by_rows < by_tokens


def expanded(mix_XR: Tensor, places_I: Tensor) -> Tensor:
    """(I, R): every row of a pivoted factor as a combination of the chosen ones.

    Args:
        mix_XR: those of the rows that are not chosen.
        places_I: of each row, its place among the chosen ones followed by the others.
    """
    chosen_RR = torch.eye(mix_XR.shape[1], dtype=mix_XR.dtype, device=mix_XR.device)
    return torch.cat((chosen_RR, mix_XR)).index_select(0, places_I)


def columns_of(y_NI: Tensor, order_I: Tensor) -> Tensor:
    """Reordered columns of a few rows.

    For several rows in 16 bits `index_select` copies number by number; `gather` takes half as long.
    """
    if len(y_NI) == 1 or y_NI.dtype is torch.float32:
        return y_NI.index_select(1, order_I)
    return y_NI.gather(1, order_I.long().expand(len(y_NI), -1))


def rows_of(y_IN: Tensor, order_I: Tensor) -> Tensor:
    """Reordered rows.

    On a CPU `gather` is as fast as a copy; `index_select` takes half as long again.
    """
    if not can_write_in_place():
        return y_IN.index_select(0, order_I)
    return y_IN.gather(0, order_I.long()[:, None].expand(-1, y_IN.shape[1]))


def orders_of(rows_R: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The numbers of rows, first the chosen ones, then the others; and each row's place there.

    By numpy, which takes a third of torch's time for so few: many sites do this as a model opens.

    Args:
        rows_R: those that are chosen.
        count: of all rows, I.

    Returns:
        Both int32 (I).
    """
    chosen_R = rows_R.cpu().numpy()
    others_I = np.ones(count, bool)
    others_I[chosen_R] = False
    made_I = np.concatenate([chosen_R, np.flatnonzero(others_I)]).astype(np.int32)
    places_I = np.empty_like(made_I)
    places_I[made_I] = np.arange(count, dtype=np.int32)
    device = rows_R.device
    return torch.from_numpy(made_I).to(device), torch.from_numpy(places_I).to(device)
