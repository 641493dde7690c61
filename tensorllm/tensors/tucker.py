"""Partial Tucker decomposition: sequentially truncated HOSVD, refined by HOOI sweeps.

Sources: Vannieuwenhoven, Vandebril and Meerbergen, "A new truncation strategy for the higher-order
singular value decomposition", SIAM J. Sci. Comput. 2012; De Lathauwer, De Moor and Vandewalle, "On
the best rank-1 and rank-(R1,...,RN) approximation of higher-order tensors", SIAM J. Matrix Anal.
2000 (HOOI).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from tensorllm.errors import UserError
from tensorllm.tensors.eigen import all_singular_values, eigh, leading_vectors, require_finite
from tensorllm.tensors.factors import Factors, Tucker, wide, wide_dtype
from tensorllm.tensors.ranks import check_rank
from tensorllm.tensors.unfold import (
    energy,
    exact_float32,
    gram,
    project,
    project_all,
    residual_energy,
)

TuckerMethod = Callable[[Tensor, Mapping[int, int], int | None, float | None], Tucker]
# One sweep is enough for most tensors (it gains less than TOL in relative error, and later ones
# gain less still); if only the spectrum of the width decays, up to a dozen are needed to come
# within 2e-4 of the limit.
SWEEPS, TOL = 12, 2e-5
TENSORLY_SWEEPS, TENSORLY_TOL = 100, 1e-5  # its own default, and the authors' tolerance


@exact_float32()
def tucker(
    w: Tensor,
    ranks: Mapping[int, int],
    *,
    sweeps: int | None = None,
    tol: float | None = None,
    method: str = "sthosvd",
) -> Tucker:
    """Decompose `w` over the modes in `ranks`.

    The factors are ordered: their leading columns, with the leading block of the core, are a good
    decomposition at every smaller rank (`truncate`).

    Args:
        w: any float dtype and any strides; computed in float32, or in float64 if it has that.
        ranks: mode -> rank, 1 to the size of the mode; other modes are not decomposed.
        sweeps: HOOI sweeps after the initial truncation, at most; None: the method's default, 12 or
            tensorly's 100.
        tol: stop the sweeps once the relative error changes by less; None: 2e-5, or 1e-5 for
            tensorly.
        method: "sthosvd", or "tensorly" for its `partial_tucker`, the slow reference.

    Raises:
        UserError: a rank or mode out of range, an unknown method, NaN or Inf in `w`.
    """
    if method not in METHODS:
        raise UserError(f"the Tucker method must be one of {', '.join(METHODS)}, got {method!r}")
    if sweeps is not None and (not isinstance(sweeps, int) or sweeps < 0):
        raise UserError(f"sweeps must be an integer, 0 or more, got {sweeps!r}")
    if tol is not None and not tol >= 0:
        raise UserError(f"tol must be a number, 0 or more, got {tol!r}")
    checked = {
        _mode(w, mode): check_rank(f"R{mode + 1}", r, w.shape[mode]) for mode, r in ranks.items()
    }
    return METHODS[method](w, checked, sweeps, tol)


def _mode(w: Tensor, mode: int) -> int:
    if not 0 <= mode < w.ndim:
        raise UserError(f"a mode of this tensor must be in 0..{w.ndim - 1}, got {mode!r}")
    return mode


def _sthosvd(w: Tensor, ranks: Mapping[int, int], sweeps: int | None, tol: float | None) -> Tucker:
    by_size = sorted(ranks, key=lambda n: w.shape[n])
    cut = [n for n in by_size if ranks[n] < w.shape[n]]  # a full-rank factor is just a rotation
    if not cut:
        require_finite(w)
        return _ordered(wide(w), {}, by_size, diagonal=None)
    factors: dict[int, Tensor] = {}
    core = first = w
    for mode in cut:
        factors[mode] = _leading(core, mode, ranks[mode])
        core = project(core, factors[mode], mode)
        first = core if mode == cut[0] else first
    sweeps = SWEEPS if sweeps is None else sweeps
    if sweeps and len(cut) > 1:
        core = _hooi(w, first, factors, core, sweeps, TOL if tol is None else tol)
        return _ordered(core, factors, by_size, diagonal=cut[0])
    return _ordered(core, factors, by_size, diagonal=cut[-1])


def _leading(w: Tensor, mode: int, rank: int) -> Tensor:
    return leading_vectors(w, mode, rank).to(wide_dtype(w))


def _hooi(
    w: Tensor, first: Tensor, factors: dict[int, Tensor], core: Tensor, sweeps: int, tol: float
) -> Tensor:
    """Improve each factor in place, given the others; returns the new core.

    A sweep ends with the smallest mode, whose initial factor was chosen without regard to the
    others. So the first sweep can start from `first`, the tensor already projected on that mode,
    which saves a costly product.
    """
    total = energy(w)
    error = _error_of(total, core)
    smallest, *others = factors
    for sweep in range(sweeps):
        done = project(w, factors[smallest], smallest) if sweep else first
        for i, mode in enumerate(others):
            x = project_all(done, {n: factors[n] for n in others[i + 1 :]})
            factors[mode] = _leading(x, mode, factors[mode].shape[1])
            if i + 1 < len(others):
                done = project(done, factors[mode], mode)
        x = project_all(w, {n: factors[n] for n in others})
        factors[smallest] = _leading(x, smallest, factors[smallest].shape[1])
        core, before = project(x, factors[smallest], smallest), error
        error = _error_of(total, core)
        if before - error < tol:
            break
    return core


def _error_of(total: float, core: Tensor) -> float:
    return math.sqrt(max(0.0, 1 - energy(core) / total)) if total else 0.0


def _ordered(
    core: Tensor, factors: Mapping[int, Tensor], modes: Iterable[int], diagonal: int | None
) -> Tucker:
    """Rotate every mode so that the core's Gram matrices are diagonal, largest entries first.

    Rotating one mode leaves the Gram matrices of the others unchanged, so the mode `diagonal`,
    which was computed last, needs no rotation.
    """
    turned = dict(factors)
    for mode in modes:
        if mode != diagonal:
            v_RR = eigh(gram(core, mode, torch.float64))[1].flip(1)
            v_RR = v_RR.to(core.dtype)
            core = project(core, v_RR, mode)
            turned[mode] = turned[mode] @ v_RR if mode in turned else v_RR
    return Tucker(core, dict(sorted(turned.items())))


def _tensorly(w: Tensor, ranks: Mapping[int, int], sweeps: int | None, tol: float | None) -> Tucker:
    import tensorly  # takes half a second to import
    from tensorly.decomposition import partial_tucker

    require_finite(w)
    modes = sorted(ranks)
    limit = TENSORLY_SWEEPS if sweeps is None else max(1, sweeps)
    tol = TENSORLY_TOL if tol is None else tol
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        (core, factors), _ = partial_tucker(
            wide(w), [ranks[n] for n in modes], modes, n_iter_max=limit, init="svd", tol=tol
        )
    return _ordered(core, dict(zip(modes, factors, strict=True)), modes, diagonal=None)


METHODS: dict[str, TuckerMethod] = {"sthosvd": _sthosvd, "tensorly": _tensorly}


@exact_float32()
def truncate(t: Tucker, ranks: Mapping[int, int], *, refine: bool = False) -> Tucker:
    """The same decomposition at smaller ranks.

    Without `refine`, leading columns and the leading block of the core: views, without arithmetic.
    The error is at most sqrt(modes) times the best if `t` was computed without sweeps, otherwise
    sqrt(2 * modes) times. With `refine` the small core is decomposed again.

    Raises:
        UserError: a mode without a factor, or a rank out of range.
    """
    for mode in ranks.keys() - t.factors.keys():
        raise UserError(f"mode {mode} has no factor to truncate; modes {list(t.factors)} have one")
    checked = {
        mode: check_rank(f"R{mode + 1}", ranks.get(mode, u.shape[1]), u.shape[1])
        for mode, u in t.factors.items()
    }
    if refine:
        inner = tucker(t.core, checked)
        return Tucker(inner.core, {n: wide(u) @ inner.factors[n] for n, u in t.factors.items()})
    core = t.core
    for mode, rank in checked.items():
        core = core.narrow(mode, 0, rank)
    return Tucker(core, {mode: u[:, : checked[mode]] for mode, u in t.factors.items()})


def spectra(w: Tensor, modes: Iterable[int]) -> dict[int, Tensor]:
    """Singular values of each mode's unfolding, float64, largest first.

    For float32 weights, values below 1e-7 of the largest are rounding errors.
    """
    return {mode: all_singular_values(w, _mode(w, mode)) for mode in modes}


def relative_error(w: Tensor, factors: Factors) -> float:
    """||w - dense|| / ||w||, with sums in float64; 0 for an exact all-zero tensor."""
    total = energy(w)
    if not math.isfinite(total):
        require_finite(w)
    share = factors.residual_share(w, total) if total else None
    if share is not None:
        return math.sqrt(share)
    left = residual_energy(w, factors.dense())
    return math.sqrt(left / total) if total else float(left > 0)


def tucker_outline(shape: Sequence[int], ranks: Mapping[int, int]) -> Tucker:
    """Tucker factors of a tensor of this shape without values, on the meta device.

    Args:
        shape: of the tensor.
        ranks: mode -> rank, of the modes that have a factor; in the others the core has the
            tensor's size.
    """
    core = [ranks.get(mode, size) for mode, size in enumerate(shape)]
    factors = {n: torch.empty(shape[n], rank, device="meta") for n, rank in ranks.items()}
    return Tucker(torch.empty(core, device="meta"), factors)
