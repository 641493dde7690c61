"""CP decomposition, by tensorly."""

from torch import Tensor

from tensorllm.errors import UserError
from tensorllm.tensors.eigen import require_finite
from tensorllm.tensors.factors import CP, wide
from tensorllm.tensors.unfold import exact_float32


@exact_float32()
def cp(w: Tensor, rank: int, *, seed: int = 0, sweeps: int = 100, tol: float = 1e-6) -> CP:
    """The sum of R rank-one tensors nearest to `w` that alternating least squares finds.

    Source: Kolda and Bader, "Tensor decompositions and applications", SIAM Review 2009, chapter 3.

    Args:
        w: any tensor of two modes or more; computed in float32 or wider.
        rank: R, 1 or more.
        seed: of the random start.
        sweeps: over the modes, at most.
        tol: the sweeps end when the relative error moves by less.

    Raises:
        UserError: rank below 1, NaN or Inf in `w`.
    """
    import tensorly  # half a second that only this needs
    from tensorly.decomposition import parafac

    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UserError(f"the CP rank must be an integer, 1 or more, got {rank!r}")
    require_finite(w)
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        weights_R, factors = parafac(
            wide(w), rank, n_iter_max=sweeps, init="random", tol=tol, random_state=seed
        )
    return CP(weights_R, tuple(factors))
