"""Truncated SVD of a matrix.

Shapes: I rows, O columns, R rank.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tensorllm.errors import UserError
from tensorllm.tensors.eigen import leading_vectors, require_finite
from tensorllm.tensors.factors import LowRank, wide, wide_dtype
from tensorllm.tensors.ranks import check_rank
from tensorllm.tensors.unfold import exact_float32

SVDMethod = Callable[[Tensor, int, int], tuple[Tensor, Tensor]]


@exact_float32()
def truncated_svd(w_IO: Tensor, rank: int, method: str = "exact", seed: int = 0) -> LowRank:
    """The rank-`rank` approximation of `w_IO` with the least squared error.

    Args:
        w_IO: any float dtype; computed in float32, or in float64 if it has that or if accuracy
            needs it.
        rank: 1 to min(I, O).
        method: "exact"; "randomized", the range finder of Halko et al. 2011 with oversampling and
            power iterations; "official", `torch.svd_lowrank(niter=2)` as in LASER's code, seeded.
        seed: of the two random methods.

    Raises:
        UserError: rank out of range, unknown method, NaN or Inf.
    """
    if method not in METHODS:
        raise UserError(f"the SVD method must be one of {', '.join(METHODS)}, got {method!r}")
    if w_IO.ndim != 2:
        raise UserError(f"truncated SVD needs a matrix, got shape {tuple(w_IO.shape)}")
    check_rank("r", rank, min(w_IO.shape))
    u_IR, v_RO = METHODS[method](w_IO, rank, seed)
    dtype = wide_dtype(w_IO)
    return _balanced(u_IR.to(dtype), v_RO.to(dtype))


def _exact(w_IO: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    short = int(w_IO.shape[1] < w_IO.shape[0])  # the mode with the smaller Gram matrix
    u = leading_vectors(w_IO, short, rank)
    x_IO = w_IO.to(u.dtype)
    return (x_IO @ u, u.mT) if short else (u, u.mT @ x_IO)


def _randomized(w_IO: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    return _lowrank(w_IO, rank, seed, oversampling=max(16, rank // 2), powers=4)


def _official(w_IO: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    return _lowrank(w_IO, rank, seed, oversampling=0, powers=2)


def _lowrank(
    w_IO: Tensor, rank: int, seed: int, oversampling: int, powers: int
) -> tuple[Tensor, Tensor]:
    require_finite(w_IO)
    q = min(rank + oversampling, *w_IO.shape)
    devices = [w_IO.device] if w_IO.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(wide(w_IO), q=q, niter=powers)
    return u[:, :rank] * s[:rank], v[:, :rank].mT


METHODS: dict[str, SVDMethod] = {
    "exact": _exact,
    "randomized": _randomized,
    "official": _official,
}


def _balanced(u_IR: Tensor, v_RO: Tensor) -> LowRank:
    """Split the singular values, which one factor holds, evenly between both."""
    ratio_R = (v_RO.norm(dim=1) / u_IR.norm(dim=0).clamp(min=1e-300)).sqrt()
    ratio_R = torch.where(torch.isfinite(ratio_R) & (ratio_R > 0), ratio_R, 1.0)
    return LowRank(u_IR * ratio_R, v_RO / ratio_R[:, None])
