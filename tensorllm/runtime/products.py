"""A vector times a matrix on a CPU: the products of decoding one token of one text.

Such a product takes as long as reading its matrix, and except for wide rows in float32, BLAS reads
it at half the memory bandwidth or less. A weighted sum of the rows of an embedding table is the
same product, and torch's kernel for it keeps the sum in registers. It also needs no compiled kernel
for every shape, which oneDNN makes for bfloat16: over half a MiB and a millisecond each, for each
of a compressed model's many ranks.

Shapes: I inputs, O outputs.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

Product = Callable[[Tensor], Tensor]  # (N, I) -> (N, O), with a given matrix

# Number of outputs up to which a sum of rows is faster than BLAS: in float32 what fits into the
# registers, in 16 bits always.
WIDEST = {torch.float32: 600, torch.bfloat16: 2**31, torch.float16: 2**31}


# Products of 16 bits that have instructions of their own are at least this many times as fast.
OWN_INSTRUCTIONS = 3
FEWEST, MOST, ENOUGH_S = 5, 20, 0.05  # products that are timed, and seconds for them


@cache
def seconds_of_product(dtype: torch.dtype) -> float:
    """Time of a product of the size found in a layer, the best of some, on this CPU."""
    x_ND, w_DD = torch.ones(128, 768, dtype=dtype), torch.ones(768, 768, dtype=dtype)
    found: list[float] = []
    # Other work on the machine makes most of them slow; emulated ones are slow by themselves.
    while len(found) < FEWEST or (len(found) < MOST and sum(found) < ENOUGH_S):
        started = time.perf_counter()
        linear(x_ND, w_DD)  # as in layers; `@` is slower still where 16 bits are emulated
        found.append(time.perf_counter() - started)
    return min(found)


def speed_of(dtype: torch.dtype | None) -> float:
    """How many times as fast as in float32 this CPU's products are; at least 1.

    Where 16 bits have instructions of their own, putting rows in order, which is no faster, weighs
    so many times more beside products. Where they are emulated, `runtime.cost` has constants.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return 1.0
    return max(1.0, seconds_of_product(torch.float32) / seconds_of_product(dtype))


def decodes(x: Tensor) -> bool:
    """Whether x (..., I) is a single token that needs no gradient.

    Never in an exported graph, which must work for any number of tokens.
    """
    if torch.compiler.is_exporting():
        return False
    return x.numel() == x.shape[-1] and not (torch.is_grad_enabled() and x.requires_grad)


def vector_times(x_I: Tensor, w_IO: Tensor) -> Tensor:
    """`x_I @ w_IO` (O,), by the fastest kernel of the machine."""
    return times(w_IO, setting(x_I))(x_I.unsqueeze(0)).squeeze(0)


class Setting(NamedTuple):
    """What the choice of kernel for a few tokens depends on, besides the matrix."""

    dtype: torch.dtype
    on_cpu: bool
    threads: int
    alone: bool  # one token, not a few


def setting(x: Tensor) -> Setting | None:
    """The setting for tokens x (..., I); None if a compiler traces or gradients are recorded."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    return Setting(x.dtype, x.is_cpu, torch.get_num_threads(), x.numel() == x.shape[-1])


def times(w_IO: Tensor, where: Setting | None) -> Product:
    """A function x_NI -> `x_NI @ w_IO` (N, O), by the fastest kernel in this setting.

    Everything that does not depend on the vector is checked here: between two products the weights
    have evicted the cache, so each check then takes as long as reading kilobytes of weights. In a
    setting, the function uses the matrix's current memory.
    """
    if where is None:
        return lambda x_NI: x_NI @ w_IO
    w_IO = w_IO.detach()  # else the kernel prepares for a gradient: four more operations
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
    """Whether the product is computed as a weighted sum of rows."""
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
    """The indices of all rows, and the start of each thread's part."""
    parts = max(1, min(threads, rows))
    with torch.inference_mode(False):
        starts = [rows * part // parts for part in range(parts)]
        return torch.arange(rows, dtype=torch.int32), torch.tensor(starts, dtype=torch.int32)
