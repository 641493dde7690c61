"""Passes over a large tensor in memory order, without ever copying it whole.

The stackings return permuted views, so every pass first sorts the modes by stride. Around one mode
the tensor then consists of blocks (A, N, B): N the size of the mode, A all modes before it in
memory, B all after it. R is a rank. Long sums are float64 sums of short float32 ones: a single
float32 dot product of 16 million terms was off by 0.4 %.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any, ClassVar

import torch
from torch import Tensor

CHUNK = 1 << 21  # numbers converted, copied or multiplied at once: they fit into the cache
TINY = 1e-25  # below this, float32 sums of squares may have lost terms to underflow
ROW = 1 << 12  # terms per float32 norm
FOLDED = 16  # from so many columns on, products are fast and summed blockwise
STRIP = 512  # columns of a Gram matrix per product
NARROW = 256  # up to so many columns, blocks are multiplied by one matrix padded with zeros


class _Exact:
    """How many `exact_float32` contexts are open in the process, and the setting outside them."""

    lock = Lock()
    depth = 0
    outside: ClassVar[list[str]] = []


@contextmanager
def exact_float32() -> Iterator[None]:
    """Compute float32 products in float32, even if TF32 or bfloat16 is allowed in the process.

    The setting is that of the whole process, including other threads. Contexts may be nested or
    overlap in several threads: the first one saves the setting and the last one restores it, also
    after an exception.

    Uses torch's setting per backend: once that was used, reading the older global one is an error.
    """
    backends: list[Any] = [torch.backends.cuda, torch.backends.mkldnn]
    products = [backend.matmul for backend in backends]
    with _Exact.lock:
        if not _Exact.depth:
            _Exact.outside = [product.fp32_precision for product in products]
        _Exact.depth += 1
        for product in products:
            product.fp32_precision = "ieee"
    try:
        yield
    finally:
        with _Exact.lock:
            _Exact.depth -= 1
            if not _Exact.depth:
                for product, precision in zip(products, _Exact.outside, strict=True):
                    product.fp32_precision = precision


def in_memory_order(w: Tensor) -> tuple[Tensor, list[int]]:
    """A contiguous view of `w` and its order of modes; a copy only if `w` has gaps in memory."""
    order = sorted(range(w.ndim), key=w.stride, reverse=True)
    view = w.permute(order)
    if view.is_contiguous():
        return view, order
    return w.contiguous(), list(range(w.ndim))


def blocks(w: Tensor, mode: int) -> tuple[Tensor, list[int], list[int]]:
    """`w` as (A, N, B) around `mode`, the sizes in memory order, and that order."""
    view, order = in_memory_order(w)
    at = order.index(mode)
    sizes = list(view.shape)
    return view.reshape(math.prod(sizes[:at]), sizes[at], -1), sizes, order


def unfolding(w: Tensor, mode: int) -> Tensor:
    """The (N, everything else) matrix of `mode`; columns in memory order, a view if possible."""
    x_ANB, _, _ = blocks(w, mode)
    if x_ANB.shape[2] == 1:
        return x_ANB[:, :, 0].mT
    return x_ANB.transpose(0, 1).reshape(x_ANB.shape[1], -1)


def _pieces(x_ANB: Tensor, size: int) -> Iterator[tuple[slice, slice]]:
    """Slices over A and B of about `size` numbers each; B is cut only if one block is too large."""
    a, n, b = x_ANB.shape
    step_a, step_b = max(1, size // (n * b)), b
    if n * b > size:
        step_b = max(1, size // n)
    for i in range(0, a, step_a):
        for j in range(0, b, step_b):
            yield slice(i, i + step_a), slice(j, j + step_b)


def gram(w: Tensor, mode: int, dtype: torch.dtype) -> Tensor:
    """The Gram matrix (N, N) of the unfolding of `mode`: products in `dtype`, sums in float64.

    Narrow blocks are folded into wider matrices, whose Gram matrix contains the wanted one in
    pieces: products of thin matrices are slow, and they sum term by term, which accumulates
    rounding errors.
    """
    x_ANB, _, _ = blocks(w, mode)
    a, n, b = x_ANB.shape
    fold = _fold(b, n)
    if fold > 1:
        wide_CC = _plain_gram(x_ANB.view(a, n * fold, b // fold), dtype)
        return torch.einsum("nfmf->nm", wide_CC.view(n, fold, n, fold))
    if n * b <= NARROW:
        fold = _fold(a, n * b)
        wide_CC = _plain_gram(x_ANB.view(a // fold, fold * n * b, 1), dtype)
        return torch.einsum("fnbfmb->nm", wide_CC.view(fold, n, b, fold, n, b))
    return _plain_gram(x_ANB, dtype)


def gram_of_columns(x_NX: Tensor) -> Tensor:
    """xᵀ x (X, X) in the dtype of `x`, computing entries above the diagonal only once."""
    width = x_NX.shape[1]
    if width < 2 * STRIP:
        return x_NX.mT @ x_NX
    out_XX = x_NX.new_empty(width, width)
    for at in range(0, width, STRIP):
        here = slice(at, at + STRIP)
        strip = x_NX[:, here].mT @ x_NX[:, at:]
        out_XX[here, at:] = strip
        out_XX[at:, here] = strip.mT
    return out_XX


def add_gram(total_XX: Tensor, x_NX: Tensor) -> None:
    """Add xᵀ x to a sum, on and above the diagonal only; `mirror` fills in the rest."""
    width = x_NX.shape[1]
    step = width if width < 2 * STRIP else STRIP
    for at in range(0, width, step):
        strip = x_NX[:, at : at + step].mT @ x_NX[:, at:]
        total_XX[at : at + step, at:] += strip.to(total_XX.device)


def mirror(total_XX: Tensor) -> Tensor:
    """Copy what is above the diagonal of a sum of Gram matrices below it, in place.

    A scalar tensor is returned unchanged.
    """
    for at in range(0, len(total_XX) if total_XX.ndim else 0, STRIP):
        here, rest = slice(at, at + STRIP), slice(at + STRIP, None)
        total_XX[here, here] = total_XX[here, here].triu() + total_XX[here, here].triu(1).mT
        total_XX[rest, here] = total_XX[here, rest].mT
    return total_XX


def _fold(long: int, short: int) -> int:
    """The largest power of two that divides `long` and keeps `short` times it within FOLDED."""
    fold = 1
    while 2 * fold * short <= FOLDED and long % (2 * fold) == 0:
        fold *= 2
    return fold


def _plain_gram(x_ANB: Tensor, dtype: torch.dtype) -> Tensor:
    n, b = x_ANB.shape[1:]
    size = max(CHUNK, 2 * n * n) if b < n else min(CHUNK, n * b)  # a single block is not copied
    total_NN = torch.zeros(n, n, dtype=torch.float64, device=x_ANB.device)
    with exact_float32():
        for at_a, at_b in _pieces(x_ANB, size):
            piece = x_ANB[at_a, :, at_b].to(dtype)
            if piece.shape[2] == 1:
                total_NN += piece[:, :, 0].mT @ piece[:, :, 0]
            else:
                x_NC = piece.transpose(0, 1).flatten(1)  # a view for a single block
                total_NN += x_NC @ x_NC.mT
    return total_NN


def project(w: Tensor, u_NR: Tensor, mode: int) -> Tensor:
    """w ×_mode uᵀ: mode `mode` of size N becomes R; dtype of `u_NR`, memory order of `w`."""
    if torch.is_grad_enabled() and (w.requires_grad or u_NR.requires_grad):  # not in place
        with exact_float32():
            return torch.tensordot(w.to(u_NR.dtype), u_NR, ([mode], [0])).movedim(-1, mode)
    x_ANB, sizes, order = blocks(w, mode)
    a, n, b = x_ANB.shape
    r = u_NR.shape[1]
    out_ARB = torch.empty(a, r, b, dtype=u_NR.dtype, device=w.device)
    size = x_ANB.numel() if x_ANB.dtype == u_NR.dtype else 4 * CHUNK
    narrow = b > 1 and a > 1 and n * b <= min(NARROW, size)
    u_wide = _times_identity(u_NR, b) if narrow else u_NR
    with exact_float32():
        for at_a, at_b in _pieces(x_ANB, size):
            piece = x_ANB[at_a, :, at_b].to(u_NR.dtype)
            if narrow or b == 1:
                torch.mm(piece.flatten(1), u_wide, out=out_ARB[at_a].flatten(1))
            else:
                out_ARB[at_a, :, at_b] = torch.matmul(u_NR.mT, piece)
    sizes[order.index(mode)] = r
    return out_ARB.view(sizes).permute(_inverse(order))


def growth(shape: Sequence[int]) -> float:
    """Sort key for products with (N, R) factors: ascending to expand, descending to project."""
    return 1 / shape[1] - 1 / shape[0]


def project_all(w: Tensor, factors: Mapping[int, Tensor]) -> Tensor:
    """`w` projected on every factor, in the order with the fewest multiply-adds."""
    for mode in sorted(factors, key=lambda n: growth(factors[n].shape), reverse=True):
        w = project(w, factors[mode], mode)
    return w


def _times_identity(u_NR: Tensor, b: int) -> Tensor:
    """u ⊗ I_B: multiplies blocks (A, N·B) as `u` multiplies (A, N)."""
    eye_BB = torch.eye(b, dtype=u_NR.dtype, device=u_NR.device)
    return (u_NR[:, None, :, None] * eye_BB[None, :, None, :]).flatten(2).flatten(0, 1)


def energy(w: Tensor) -> float:
    """The sum of squares, to a relative accuracy of about 1e-6; Inf or NaN if `w` has one."""
    flat = in_memory_order(w)[0].reshape(-1)
    if w.dtype != torch.float64:
        total = _energy(flat, torch.float32)
        if TINY < total < math.inf:  # no square under- or overflowed
            return total
    return _energy(flat, torch.float64)


def _energy(flat: Tensor, dtype: torch.dtype) -> float:
    total = 0.0
    for piece in flat.split(16 * CHUNK):
        wide = piece.to(dtype)
        rows = wide[: wide.numel() // ROW * ROW].view(-1, ROW)
        norms = torch.linalg.vector_norm(rows, dim=1).double()
        rest = wide[rows.numel() :].double()
        total += float(norms.square().sum() + rest.square().sum())
    return total


def residual_energy(w: Tensor, approximation: Tensor) -> float:
    """The sum of squares of `w - approximation`, chunk by chunk along w's first axis in memory."""
    view, order = in_memory_order(w)
    other = approximation.permute(order)
    step = max(1, 4 * CHUNK * view.shape[0] // view.numel())
    pairs = zip(view.split(step), other.split(step), strict=True)
    return sum(energy(x - y) for x, y in pairs)


def all_finite(w: Tensor) -> bool:
    """Whether every number is finite."""
    if not w.numel():
        return True
    # Minimum and maximum propagate NaN and Inf, and are fifty times faster than isfinite.
    low, high = torch.aminmax(in_memory_order(w)[0])
    return math.isfinite(low) and math.isfinite(high)


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)
