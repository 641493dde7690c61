"""Leading singular vectors of an unfolding, by the cheapest method that is accurate enough.

A Gram matrix squares the condition number: rounding errors of about e = unit·max(diagonal) in its
entries rotate a kept component i towards a discarded j by the angle e/(λi - λj), which loses the
energy e²/(λi - λj). If the sum of these losses is far below the energy that is discarded anyway,
the Gram matrix is as good as an SVD; otherwise the next more accurate method is tried: float32
products, float64 products, SVD in float64. On flat, decaying, stepped and planted spectra the sum
was 7 to 1e9 times the true loss.

Shapes: N size of the mode, C columns of its unfolding, R rank, S the smaller of N and C.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from tensorllm.errors import UserError
from tensorllm.tensors.threads import one_thread
from tensorllm.tensors.unfold import all_finite, gram, unfolding

LOSS = 5e-6  # estimated energy that rounding may lose, as a share of the energy discarded
VALUES = 1e4  # singular values come from a Gram matrix if their squares exceed so many e
LARGE = 1024  # from this size on eigendecompositions cost more than all the products


def leading_vectors(w: Tensor, mode: int, rank: int) -> Tensor:
    """The `rank` leading left singular vectors (N, R) of the unfolding of `mode`, leading first.

    For float32 or narrower input, float64 products are the last resort: they lose about 1e-16 of
    the energy, less than rounding the factors to float32.

    Raises:
        UserError: `w` has NaN or Inf.
    """
    for dtype in _dtypes(w):
        found = _by_gram(w, mode, rank, dtype, last=_is_last(w, dtype))
        if found is not None:
            return found
    require_finite(w)
    return _orthonormal(_svd(unfolding(w, mode))[0], rank)


def all_singular_values(w: Tensor, mode: int) -> Tensor:
    """The S singular values of the unfolding of `mode`, float64, largest first.

    Each has a relative error of at most 1e-4 or, for float32 or narrower `w`, an absolute one of
    1e-7 of the largest.

    Raises:
        UserError: `w` has NaN or Inf.
    """
    for dtype in _dtypes(w):
        g_SS = _smaller_gram(w, mode, dtype)
        entry = torch.finfo(dtype).eps / 2 * float(g_SS.diagonal().max())
        if math.isfinite(entry):
            values = torch.linalg.eigvalsh(g_SS).flip(0).clamp(min=0)
            if _is_last(w, dtype) or float(values[-1]) > VALUES * entry:
                return values.sqrt()
    require_finite(w)
    return _svd(unfolding(w, mode))[1]


def require_finite(w: Tensor) -> None:
    """Raise a UserError if there is a NaN or an Inf."""
    if not all_finite(w):
        raise UserError("the weights must be finite numbers, but there are NaN or Inf among them")


def _dtypes(w: Tensor) -> tuple[torch.dtype, ...]:
    """The dtypes in which Gram matrices are tried, in turn."""
    return (torch.float64,) if w.dtype == torch.float64 else (torch.float32, torch.float64)


def _is_last(w: Tensor, dtype: torch.dtype) -> bool:
    """Whether products in `dtype` are always accurate enough: float64 for narrower input."""
    return dtype == torch.float64 and w.dtype != torch.float64


def _is_tall(w: Tensor, mode: int) -> bool:
    return w.shape[mode] ** 2 > w.numel()


def _smaller_gram(w: Tensor, mode: int, dtype: torch.dtype) -> Tensor:
    return gram(unfolding(w, mode), 1, dtype) if _is_tall(w, mode) else gram(w, mode, dtype)


def _by_gram(w: Tensor, mode: int, rank: int, dtype: torch.dtype, last: bool) -> Tensor | None:
    """Leading vectors from a Gram matrix; None if rounding may cost too much.

    With `last` None only if `w` is not finite.
    """
    g_SS = _smaller_gram(w, mode, dtype)
    largest = float(g_SS.diagonal().max())
    underflows = largest * torch.finfo(dtype).eps < torch.finfo(dtype).tiny
    if not math.isfinite(largest) or (underflows and not last):
        return None
    entry = torch.finfo(dtype).eps / 2 * largest
    if len(g_SS) >= LARGE and dtype == torch.float32:
        g_SS = g_SS.float()
        entry += torch.finfo(dtype).eps / 2 * float(torch.linalg.matrix_norm(g_SS))
    ascending, v_SS = eigh(g_SS)
    if not last and not _is_exact_enough(ascending.flip(0).double(), rank, entry):
        return None
    v_SR = v_SS.flip(1)[:, :rank].contiguous()
    if not _is_tall(w, mode):
        return v_SR
    # QR keeps the left vectors orthonormal where singular values vanish.
    return _orthonormal(unfolding(w, mode).to(dtype) @ v_SR.to(dtype), rank)


def _is_exact_enough(values_S: Tensor, rank: int, entry: float) -> bool:
    """Whether errors of size `entry` in the Gram matrix lose little next to what is discarded."""
    kept_R, dropped_T = values_S[:rank], values_S[rank:]
    if dropped_T.numel() == 0:
        return True
    gaps_RT = (kept_R[:, None] - dropped_T).clamp(min=entry)
    discarded = float(dropped_T.clamp(min=0).sum()) - values_S.numel() * entry
    return float((entry**2 / gaps_RT).sum()) <= LOSS * discarded


def _orthonormal(y_NR: Tensor, rank: int) -> Tensor:
    mode = "reduced" if y_NR.shape[1] >= rank else "complete"
    with _few_threads(y_NR.shape[1]):
        return torch.linalg.qr(y_NR, mode=mode).Q[:, :rank]


def eigh(g_SS: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, smallest first, and eigenvectors of a symmetric matrix."""
    with _few_threads(len(g_SS)):
        values_S, vectors_SS = torch.linalg.eigh(g_SS)
    return values_S, vectors_SS


def product_dtype(order: int) -> torch.dtype:
    """The dtype of factorisations of covariances of this order: float32 from `LARGE` on.

    Rounding errors are then small next to the sampling error of a covariance.
    """
    return torch.float32 if order >= LARGE else torch.float64


def eigenvalues(g_NN: Tensor) -> Tensor:
    """The eigenvalues of a float64 covariance, largest first, float64.

    Computed in `product_dtype`: in float32, eigenvalues below about a millionth of the largest are
    rounding errors, which no error curve is sensitive to.
    """
    with _few_threads(len(g_NN)):
        values_N = torch.linalg.eigvalsh(g_NN.to(product_dtype(len(g_NN))))
    return values_N.flip(0).double()


def leading_eigenvectors(g_NN: Tensor, rank: int) -> Tensor:
    """The `rank` leading eigenvectors (N, R) of a covariance, in `product_dtype`, leading first."""
    return eigh(g_NN.to(product_dtype(len(g_NN))))[1].flip(1)[:, :rank]


def leading_subspace(g_NN: Tensor, rank: int) -> Tensor:
    """An orthonormal basis (N, R), in `product_dtype`, of approximately the leading eigenspace.

    Below order `LARGE` the `rank` leading eigenvectors; from there on the range of the matrix times
    `rank` random vectors (Halko, Martinsson and Tropp 2011, algorithm 4.1).
    """
    if len(g_NN) < LARGE:
        return leading_eigenvectors(g_NN, rank)
    draws = torch.Generator(g_NN.device).manual_seed(0)
    sketch_NR = torch.randn(len(g_NN), rank, generator=draws, device=g_NN.device)
    return torch.linalg.qr(g_NN.float() @ sketch_NR).Q


def _few_threads(size: int) -> AbstractContextManager[None]:
    """One thread for a small factorisation, which consists of many short steps.

    Two threads are a third faster on an idle machine, but if other processes use the cores, the
    threads wait for each other at every step, and 20 times slower was seen.
    """
    if size >= 2 * LARGE or torch.get_num_threads() == 1:
        return nullcontext()
    return one_thread()


def _svd(x_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Left vectors (N, S) and singular values of a matrix, in float64."""
    wide_NC = x_NC.double()
    if wide_NC.shape[1] > wide_NC.shape[0]:
        wide_NC = torch.linalg.qr(wide_NC.mT, mode="r").R.mT
    u_NS, singular_S, _ = torch.linalg.svd(wide_NC, full_matrices=False)
    return u_NS, singular_S
