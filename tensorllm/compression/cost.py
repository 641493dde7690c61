"""Predict what a compression costs on this machine, to about a factor of two."""

import time
from collections.abc import Iterable
from math import prod


def decomposition_seconds(shapes: Iterable[tuple[int, ...]], speed: float) -> float:
    """Predicted time, in seconds, to decompose tensors of these shapes.

    Modelled as ten passes of products with the second largest mode, which fits a GPT-J layer with
    one HOOI sweep on two cores (1.1 s at 156 GFLOP/s).

    Args:
        speed: float32 flop per second, as `gemm_speed` measures it.
    """
    return sum(10.0 * prod(shape) * sorted(shape)[-2] for shape in shapes) / speed


def gemm_speed() -> float:
    """Speed of float32 matrix products on this machine's processor, in flop per second."""
    import torch

    size = 1024
    a = torch.randn(size, size)
    _ = a @ a
    started = time.perf_counter()
    _ = a @ a
    return 2 * size**3 / (time.perf_counter() - started)
