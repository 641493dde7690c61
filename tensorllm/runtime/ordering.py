"""The numbers of tokens put in another order, by the fastest kernel there is.

Shapes: N tokens, I numbers of each.
"""

import torch
from torch import Tensor


def can_write_in_place() -> bool:
    """Whether numbers may be written in place: no gradients are recorded, no compiler traces."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def columns_of(y_NI: Tensor, order_I: Tensor) -> Tensor:
    """Columns in an order, of few rows: of several in 16 bits `index_select` copies number by
    number, and `gather` takes half as long."""
    if len(y_NI) == 1 or y_NI.dtype is torch.float32:
        return y_NI.index_select(1, order_I)
    return y_NI.gather(1, order_I.long().expand(len(y_NI), -1))


def rows_of(y_IN: Tensor, order_I: Tensor) -> Tensor:
    """Rows in an order: on a CPU as fast as a copy, for which `index_select` takes half as long
    again."""
    if not can_write_in_place():
        return y_IN.index_select(0, order_I)
    return y_IN.gather(0, order_I.long()[:, None].expand(-1, y_IN.shape[1]))
