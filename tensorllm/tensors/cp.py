"""CP decomposition, by tensorly."""

import tensorly as tl
from tensorly.decomposition import parafac
from torch import Tensor

from tensorllm.tensors.factors import CP, wide


def cp(w: Tensor, rank: int, *, seed: int = 0, sweeps: int = 100, tol: float = 1e-6) -> CP:
    """Best rank-R sum of rank-one tensors that alternating least squares finds.

    Source: Kolda and Bader, "Tensor decompositions and applications", SIAM Review 2009, section 3.4.

    Args:
        w: any tensor; computed in float32 or wider.
        rank: R, 1 or more.
        seed: of the random start.
    """
    with tl.backend_context("pytorch", local_threadsafe=True):
        weights, factors = parafac(
            wide(w), rank, n_iter_max=sweeps, init="random", tol=tol, random_state=seed
        )
    return CP(weights, tuple(factors))
