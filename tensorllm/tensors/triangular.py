"""Triangular matrices: Cholesky factors, their inverses, and products that skip known zeros.

Products are computed in strips, each one dense product, so they need no special kernel on any
device.

Shapes: N size of the triangular matrix L, M rows or columns of the other.
"""

import torch
from torch import Tensor

from tensorllm.errors import UserError
from tensorllm.tensors.unfold import STRIP


def raised_cholesky(covariance_NN: Tensor, least: float, factor: float) -> Tensor:
    """The lower Cholesky factor (N, N) of a covariance.

    If rounding made the covariance indefinite, its diagonal is raised until it is positive
    definite.

    Args:
        covariance_NN: symmetric.
        least: the first amount added, above 0.
        factor: by which the amount grows with each attempt, above 1.

    Raises:
        UserError: the covariance has NaN or Inf.
    """
    if not torch.isfinite(covariance_NN).all():
        raise UserError(
            "a covariance of the calibration set has NaN or Inf: activations or gradients overflow "
            "in the model's dtype; load it in float32 or bfloat16"
        )
    root_NN, failed = torch.linalg.cholesky_ex(covariance_NN)
    while int(failed):
        raised_NN = covariance_NN.clone()
        raised_NN.diagonal().add_(least)
        root_NN, failed = torch.linalg.cholesky_ex(raised_NN)
        least *= factor
    return root_NN


def lower_inverse(lower_NN: Tensor) -> Tensor:
    """L⁻¹ for a lower triangular L."""
    eye_NN = torch.eye(len(lower_NN)).to(lower_NN)
    return torch.linalg.solve_triangular(lower_NN, eye_NN, upper=False)


def times_lower(x_MN: Tensor, lower_NN: Tensor) -> Tensor:
    """X L for a lower triangular L, with half the multiply-adds."""
    width = len(lower_NN)
    if width < 2 * STRIP:
        return x_MN @ lower_NN
    out_MN = x_MN.new_empty(len(x_MN), width)
    for at in range(0, width, STRIP):
        here = slice(at, at + STRIP)
        torch.mm(x_MN[:, at:], lower_NN[at:, here], out=out_MN[:, here])
    return out_MN


def transposed_lower_times(lower_NN: Tensor, x_NM: Tensor) -> Tensor:
    """Lᵀ X for a lower triangular L, with half the multiply-adds."""
    width = len(lower_NN)
    if width < 2 * STRIP:
        return lower_NN.mT @ x_NM
    out_NM = x_NM.new_empty(width, x_NM.shape[1])
    for at in range(0, width, STRIP):
        here = slice(at, at + STRIP)
        torch.mm(lower_NN[at:, here].mT, x_NM[at:], out=out_NM[here])
    return out_NM


def congruent(c_NN: Tensor, half_NN: Tensor, *, lower: bool) -> Tensor:
    """Hᵀ C H for a symmetric C, exactly symmetric.

    Takes a third of the multiply-adds of two dense products if H is lower triangular, otherwise
    three quarters.

    Args:
        c_NN: C.
        half_NN: H.
        lower: whether H is lower triangular.
    """
    width = len(c_NN)
    if width < 2 * STRIP:
        out_NN = half_NN.mT @ c_NN @ half_NN
        return (out_NN + out_NN.mT) / 2
    right_NN = times_lower(c_NN, half_NN) if lower else c_NN @ half_NN
    out_NN = torch.empty_like(right_NN)
    for at in range(0, width, STRIP):
        here, end = slice(at, at + STRIP), min(at + STRIP, width)
        first = at if lower else 0  # this strip of H is zero above it
        strip = half_NN[first:, here].mT @ right_NN[first:, :end]
        out_NN[here, :end] = strip
        out_NN[:at, here] = strip[:, :at].mT
        own = strip[:, at:]
        out_NN[here, here] = (own + own.mT) / 2
    return out_NN
