"""Step sizes for training factors, relative to the size of each parameter."""

import math

import torch
from torch import Tensor

NO_GRADIENT = 1e-20  # smallest divisor in Adam
ROUNDING = 1e-3  # times the mean gradient: smallest divisor, or Adam follows rounding noise


def mean_size(x: Tensor) -> float:
    """The root of the mean square."""
    return float(x.detach().square().mean().sqrt())


def warmed_up(step: int, steps: int) -> float:
    """Learning rate factor: linear warm-up over a tenth of the steps, then cosine decay."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    if step >= steps:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def damp_rounding(optimizer: torch.optim.Adam) -> None:
    """Shorten steps along gradients that are rounding noise, which Adam would normalise.

    Call at the first step, once gradients exist.
    """
    for group in optimizer.param_groups:
        grads = [p.grad for p in group["params"] if p.grad is not None]
        group["eps"] = max([NO_GRADIENT, *(ROUNDING * mean_size(grad) for grad in grads)])
