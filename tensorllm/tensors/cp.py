"""CP decomposition, computed by tensorly."""

import math

import torch
from torch import Tensor

from tensorllm.errors import UserError
from tensorllm.tensors.eigen import require_finite
from tensorllm.tensors.factors import CP, wide
from tensorllm.tensors.unfold import all_finite, exact_float32


@exact_float32()
def cp(w: Tensor, rank: int, *, seed: int = 0, sweeps: int = 100, tol: float = 1e-6) -> CP:
    """A CP decomposition of `w` of rank R, by alternating least squares.

    Source: Kolda and Bader, "Tensor decompositions and applications", SIAM Review 2009, chapter 3.

    Args:
        w: any tensor of two or more modes; computed in float32 or wider.
        rank: R, 1 or more.
        seed: of the random start.
        sweeps: over the modes, at most.
        tol: stop when the relative error changes by less.

    Raises:
        UserError: rank below 1, or so high that the least squares are singular; NaN or Inf in `w`.
    """
    import tensorly  # takes half a second to import
    from tensorly.decomposition import parafac

    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UserError(f"the CP rank must be an integer, 1 or more, got {rank!r}")
    require_finite(w)
    w = wide(w)
    if not w.any():
        return CP(w.new_ones(rank), tuple(w.new_zeros(size, rank) for size in w.shape))
    # ALS takes fourth powers, which over- or underflow; scaling by a power of two is exact.
    scale = 2.0 ** math.frexp(float(w.abs().max()))[1]
    try:
        with tensorly.backend_context("pytorch", local_threadsafe=True):
            weights_R, (first, *others) = parafac(
                w / scale, rank, n_iter_max=sweeps, init="random", tol=tol, random_state=seed
            )
        found = CP(weights_R, (first * scale, *others))
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # documented there
        found = None
    if found is None or not all(map(all_finite, found.tensors().values())):
        raise UserError(
            f"alternating least squares cannot tell {rank} components of this tensor apart "
            f"(shape {tuple(w.shape)}); give a CP rank below {rank}"
        )
    return found
