"""Leading singular vectors of an unfolding, by the cheapest way that is exact enough.

Gram matrices square the condition number. Rounding moves their eigenvalues by about δ = unit·λ_max,
so r components chosen by one lose at most about 2·r·δ of energy against the best r. Where that is
far below the energy that is discarded anyway, the cheap Gram matrix is as good as an SVD; else the
next exact way is taken: float32 products, float64 products, SVD in float64.

Shapes: N size of the mode, C columns of its unfolding, R rank, S the smaller of N and C.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tensorllm.errors import UserError
from tensorllm.tensors.unfold import all_finite, gram, unfolding

LOSS = 1e-6  # energy that rounding may lose, as a share of the energy that is discarded
UNIT = {torch.float32: 1e-7, torch.float64: 2e-16}  # rounding of a Gram matrix relative to λ_max


class Leading(NamedTuple):
    """Orthonormal leading vectors, and all singular values, largest first."""

    u_NR: Tensor
    singular_S: Tensor


def leading_vectors(w: Tensor, mode: int, rank: int) -> Leading:
    """The `rank` leading left singular vectors of the unfolding of `mode`.

    Float64 products are the last way for what came in float32 or narrower: what they may lose, a
    share of 2·r·2e-16 of the energy, is less than what rounding the factors to float32 loses.

    Raises:
        UserError: `w` holds NaN or Inf.
    """
    if w.dtype != torch.float64:
        found = _by_gram(w, mode, rank, torch.float32, LOSS)
        if found is not None:
            return found
    found = _by_gram(w, mode, rank, torch.float64, LOSS if w.dtype == torch.float64 else math.inf)
    if found is not None:
        return found
    require_finite(w)
    return _by_svd(w, mode, rank)


def require_finite(w: Tensor) -> None:
    """UserError where there is a NaN or an Inf."""
    if not all_finite(w):
        raise UserError("the weights must be finite numbers, but there are NaN or Inf among them")


def _by_gram(w: Tensor, mode: int, rank: int, dtype: torch.dtype, loss: float) -> Leading | None:
    """None where rounding may cost more than `loss` of the energy that is discarded anyway."""
    n = w.shape[mode]
    tall = n * n > w.numel()
    x_NC = unfolding(w, mode) if tall else w.new_empty(0)
    g_SS = gram(x_NC, 1, dtype) if tall else gram(w, mode, dtype)
    if not bool(torch.isfinite(g_SS.diagonal()).all()):
        return None
    ascending, v_SS = torch.linalg.eigh(g_SS)
    values, v_SR = ascending.flip(0).clamp(min=0), v_SS.flip(1)[:, :rank]
    lost, discarded = 2 * rank * UNIT[dtype] * float(values[0]), float(values[rank:].sum())
    vanishes = float(values[0]) < torch.finfo(dtype).tiny / UNIT[dtype]  # squares underflow
    if vanishes or (lost > loss * discarded and loss < math.inf):
        return None
    # QR keeps the left vectors orthonormal where singular values vanish.
    u_NR = _orthonormal(x_NC.to(dtype) @ v_SR.to(dtype), rank) if tall else v_SR
    return Leading(u_NR, values.sqrt())


def _orthonormal(y_NR: Tensor, rank: int) -> Tensor:
    mode = "reduced" if y_NR.shape[1] >= rank else "complete"
    return torch.linalg.qr(y_NR, mode=mode).Q[:, :rank]


def _by_svd(w: Tensor, mode: int, rank: int) -> Leading:
    x_NC = unfolding(w, mode).double()
    if x_NC.shape[1] > x_NC.shape[0]:
        x_NC = torch.linalg.qr(x_NC.mT, mode="r").R.mT
    u_NS, singular_S, _ = torch.linalg.svd(x_NC, full_matrices=False)
    return Leading(_orthonormal(u_NS, rank) if rank > u_NS.shape[1] else u_NS[:, :rank], singular_S)
