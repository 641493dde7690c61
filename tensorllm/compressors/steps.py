"""The length of the steps by which factors are trained: shares of each parameter's size."""

import math

import torch
from torch import Tensor

NO_GRADIENT = 1e-20  # Adam's divisor there, at least
ROUNDING = 1e-3  # of a parameter's mean gradient: much below it a step would be as long, and random


def mean_size(x: Tensor) -> float:
    """The root of the mean square."""
    return float(x.detach().square().mean().sqrt())


def warmed_up(step: int, steps: int) -> float:
    """The share of the learning rate: warm-up over a tenth of the steps, then a cosine."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    if step >= steps:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def damp_rounding(optimizer: torch.optim.Adam) -> None:
    """Shorter steps where a gradient is rounding: Adam divides it by its own size.

    Called at the first step, with the gradients there.
    """
    for group in optimizer.param_groups:
        grads = [p.grad for p in group["params"] if p.grad is not None]
        group["eps"] = max([NO_GRADIENT, *(ROUNDING * mean_size(grad) for grad in grads)])
