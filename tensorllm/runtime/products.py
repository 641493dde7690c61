"""A vector times a matrix on a CPU: what decoding one token of one text consists of.

Such a product takes as long as its matrix takes to be read, and BLAS reads it at half the speed of
memory or less, but for wide rows in float32. A weighted sum of
an embedding table's rows is the same product, and torch's kernel for it keeps the sum in registers.
It also needs no program of its own for every shape, which is what oneDNN makes for bfloat16: more
than half a MiB and a millisecond each, for each of the many ranks that a compressed model has.
Shapes: I inputs, O outputs.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]  # of rows (N, I) and a matrix: (N, O)

# Outputs up to which a sum of rows is faster than BLAS: in float32 what fits the registers, beyond
# which BLAS reads as fast; in 16 bits always.
WIDEST = {torch.float32: 600, torch.bfloat16: 2**31, torch.float16: 2**31}


def decodes(x: Tensor) -> bool:
    """Whether x (..., I) is one token that nothing is to be learned from.

    Never in a graph that is exported: that holds for any number of tokens.
    """
    if torch.compiler.is_exporting():
        return False
    return x.numel() == x.shape[-1] and not (torch.is_grad_enabled() and x.requires_grad)


def vector_times(x_I: Tensor, w_IO: Tensor) -> Tensor:
    """`x_I @ w_IO` (O,), by the fastest kernel of the machine."""
    return times(w_IO, setting(x_I))(x_I.unsqueeze(0)).squeeze(0)


class Setting(NamedTuple):
    """What, beside the matrix, the kernel of a few tokens depends on."""

    dtype: torch.dtype
    on_cpu: bool
    threads: int
    alone: bool  # one token, not a few


def setting(x: Tensor) -> Setting | None:
    """In which tokens x (..., I) are multiplied now; None: their kernel is the compiler's choice or
    must know its own gradient."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    return Setting(x.dtype, x.is_cpu, torch.get_num_threads(), x.numel() == x.shape[-1])


def times(w_IO: Tensor, where: Setting | None) -> Product:
    """x_NI -> `x_NI @ w_IO` (N, O), by the fastest kernel there is in this setting.

    What can be asked before the vector is there is asked here: between two products a processor has
    forgotten what it knew, and each question then takes as long as reading kilobytes of weights.
    In a setting it is a product with the numbers that the matrix has where it lies now.
    """
    if where is None:
        return lambda x_NI: x_NI @ w_IO
    w_IO = w_IO.detach()  # else the kernel prepares for a gradient, in four more operations
    if not _summed(w_IO, where):
        return lambda x_NI: torch.mm(x_NI, w_IO)
    rows_I, starts = _bags(w_IO.size(0), where.threads)
    sums = torch.embedding_bag
    if starts.numel() == 1:
        return lambda x_1I: sums(w_IO, rows_I, starts, False, 0, False, x_1I.view(-1))[0]
    return lambda x_1I: sums(w_IO, rows_I, starts, False, 0, False, x_1I.view(-1))[0].sum(
        0, keepdim=True
    )


def _summed(w_IO: Tensor, where: Setting) -> bool:
    """Whether it is taken as a weighted sum of rows."""
    return (
        where.alone
        and where.on_cpu
        and w_IO.is_cpu
        and 0 < w_IO.size(1) <= WIDEST.get(w_IO.dtype, 0)
        and where.dtype is w_IO.dtype
        and w_IO.is_contiguous()
        and w_IO.size(0) > 0
    )


@cache
def _bags(rows: int, threads: int) -> tuple[Tensor, Tensor]:
    """The numbers of all rows, and where the part of each thread begins."""
    parts = max(1, min(threads, rows))
    with torch.inference_mode(False):
        starts = [rows * part // parts for part in range(parts)]
        return torch.arange(rows, dtype=torch.int32), torch.tensor(starts, dtype=torch.int32)
