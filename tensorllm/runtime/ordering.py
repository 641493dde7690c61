"""Reordering rows or columns of activations, by the fastest kernel available.

Shapes: N tokens, I features of each.
"""

import numpy as np
import torch
from torch import Tensor


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


def order_of(rows_R: Tensor, count: int, *, places: bool) -> Tensor:
    """The numbers of rows, int32 (I): first the chosen ones, then the others.

    By numpy, which takes a third of torch's time for so few: many sites do this as a model opens.

    Args:
        rows_R: those that are chosen.
        count: of all rows, I.
        places: the place of each row in that order instead.
    """
    chosen_R = rows_R.cpu().numpy()
    others_I = np.ones(count, bool)
    others_I[chosen_R] = False
    order_I = np.concatenate([chosen_R, np.flatnonzero(others_I)]).astype(np.int32)
    if places:
        order_I[order_I.copy()] = np.arange(count, dtype=np.int32)
    return torch.from_numpy(order_I).to(rows_R.device)
