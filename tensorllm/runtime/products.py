"""A vector times a matrix on a CPU: what decoding one token of one text consists of.

Such a product takes as long as its matrix takes to be read, and BLAS reads it at half the speed of
memory or less, but for wide rows in float32. A weighted sum of
an embedding table's rows is the same product, and torch's kernel for it keeps the sum in registers.
It also needs no program of its own for every shape, which is what oneDNN makes for bfloat16: more
than half a MiB and a millisecond each, for each of the many ranks that a compressed model has.
Shapes: I inputs, O outputs.
"""

from functools import cache

import torch
from torch import Tensor

WIDEST = 600  # outputs whose sum in float32 fits the registers; BLAS reads wider rows as fast


def decodes(x: Tensor) -> bool:
    """Whether x (..., I) is one token that nothing is to be learned from.

    Never in a graph that is exported: that holds for any number of tokens.
    """
    if torch.compiler.is_exporting():
        return False
    return x.numel() == x.shape[-1] and not (torch.is_grad_enabled() and x.requires_grad)


def vector_times(x_I: Tensor, w_IO: Tensor) -> Tensor:
    """`x_I @ w_IO` (O,), by the fastest kernel of the machine."""
    if not _summed(x_I, w_IO):
        return x_I @ w_IO
    rows_I, starts = _bags(len(x_I), torch.get_num_threads())
    parts: Tensor = torch.embedding_bag(w_IO, rows_I, starts, False, 0, False, x_I)[0]
    return parts[0] if len(parts) == 1 else parts.sum(0)


def _summed(x_I: Tensor, w_IO: Tensor) -> bool:
    """Whether it is taken as a weighted sum of rows."""
    return (
        w_IO.device.type == "cpu"
        and (w_IO.dtype != torch.float32 or w_IO.shape[1] <= WIDEST)
        and w_IO.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x_I.dtype == w_IO.dtype
        and w_IO.is_contiguous()
        and x_I.is_contiguous()
        and w_IO.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


@cache
def _bags(rows: int, threads: int) -> tuple[Tensor, Tensor]:
    """The numbers of all rows, and where the part of each thread begins."""
    parts = max(1, min(threads, rows))
    with torch.inference_mode(False):
        starts = [rows * part // parts for part in range(parts)]
        return torch.arange(rows, dtype=torch.int32), torch.tensor(starts, dtype=torch.int32)
