"""All experts of a layer as one tensor, decomposed under weights of its errors in each mode.

W (E, F, D, S) holds the S matrices of each of E experts; F is the experts' inner width and D the
model width, so output projections are transposed. A mode of full rank is not compressed: it has no
factor and costs nothing. With a root S_n of the error weights of each mode, W ×_n S_n is decomposed
and the roots are divided out of the factors and core again, so that ||(W - dense) ×_n S_n|| is
small (multilinear whitening; TD-MoE, ICLR 2026).

Shapes: N size of a mode, R rank, B rank of the inner mode.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tensorllm.tensors.energy import SizedCurve, candidates, sized_curve
from tensorllm.tensors.factors import Tucker
from tensorllm.tensors.tucker import tucker
from tensorllm.tensors.unfold import project

EXPERTS, INNER, WIDTH, MATRICES = range(4)  # the modes
FLOOR = 1e-6  # weight of a direction without data, relative to the mean eigenvalue
EVERY = 2**21  # up to so many combinations of ranks all are tried, beyond in steps of 5 %
# Mode -> symmetric root (N, N) of the weights of its errors. (E, F, F) on the inner mode: one for
# each expert, if neither the expert mode nor the inner mode is compressed.
Roots = Mapping[int, Tensor]


def stored_numbers(shape: Sequence[int], ranks: Sequence[int]) -> int:
    """Numbers in core and factors; a mode of full rank has no factor."""
    cut = [(n, r) for n, r in zip(shape, ranks, strict=True) if r < n]
    return math.prod(ranks) + sum(n * r for n, r in cut)


def root_of(weights_NN: Tensor, mean: float | None = None, ridge: float = FLOOR) -> Tensor:
    """The symmetric root (N, N), float64, of weights divided by their mean eigenvalue.

    Args:
        weights_NN: if zero, nothing is known of the mode, and the root is the identity.
        mean: divide by this instead.
        ridge: added to all eigenvalues, relative to their mean.
    """
    weights_NN = weights_NN.double()
    own = float(weights_NN.diagonal().mean())
    if not own > 0:
        return torch.eye(len(weights_NN), dtype=torch.float64, device=weights_NN.device)
    values_N, v_NN = torch.linalg.eigh(weights_NN / own)
    return (v_NN * ((values_N.clamp(min=0) + ridge) * own / (mean or own)).sqrt()) @ v_NN.mT


def weighted(w: Tensor, roots: Roots) -> Tensor:
    """W ×_n S_n over the modes that have a root, in float64 if there is one."""
    for mode, root in roots.items():
        w = _times(w.double(), root, mode)
    return w


def _times(w: Tensor, root: Tensor, mode: int) -> Tensor:
    if root.ndim == 2:
        return project(w, root, mode)
    return torch.einsum("efds,efg->egds", w, root)


def weighted_tucker(w: Tensor, ranks: Sequence[int], roots: Roots, *, sweeps: int = 1) -> Tucker:
    """A Tucker decomposition with orthonormal factors and a small weighted error.

    Args:
        w: (E, F, D, S).
        ranks: of all four modes.
        roots: of the weights of errors.
        sweeps: HOOI sweeps, at most.
    """
    cut = {mode: r for mode, r in enumerate(ranks) if r < w.shape[mode]}
    found = tucker(weighted(w, roots), cut, sweeps=sweeps)
    core, factors = found.core, dict(found.factors)
    for mode, root in roots.items():
        if mode in cut:
            factors[mode] = torch.linalg.solve(root, factors[mode])
        else:
            core = _times(core, torch.linalg.inv(root), mode)
    for mode in roots.keys() & cut.keys():  # no longer orthonormal after the solve
        factors[mode], left_RR = torch.linalg.qr(factors[mode])
        core = project(core, left_RR.mT, mode)
    return Tucker(core, factors)


def refitted(w: Tensor, found: Tucker, weights_of: Callable[[int], Tensor]) -> Tucker:
    """The same factors with the core that is best for each expert's own input weights.

    Only the inner mode and the width may have a factor, so that every expert and matrix has its own
    part of the core.

    Args:
        w: (E, F, D, S).
        found: the decomposition.
        weights_of: (D, D) of an expert, positive definite; called for one expert at a time.
    """
    u_DR = found.factors[WIDTH].double()
    u_FB = found.factors.get(INNER)
    core = torch.empty_like(found.core)
    for expert, w_FDS in enumerate(w.unbind(0)):
        seen_DR = weights_of(expert) @ u_DR
        right_FRS = project(w_FDS.double(), seen_DR, 1)
        right_BRS = right_FRS if u_FB is None else project(right_FRS, u_FB.double(), 0)
        columns_RC = right_BRS.transpose(0, 1).flatten(1)
        made_RC = torch.linalg.solve(u_DR.mT @ seen_DR, columns_RC)
        core[expert] = made_RC.unflatten(1, right_BRS.shape[::2]).transpose(0, 1)
    return Tucker(core, found.factors)


def size_curve(w: Tensor, roots: Roots, modes: Sequence[int]) -> SizedCurve:
    """The Pareto-optimal ranks by ascending cost, with the weighted error of truncating to them.

    Computed from one full higher-order SVD: the error is the energy of the core outside the leading
    block. The last size, all 0, leaves the tensor as it is. Errors are those of the weighted tensor
    scaled to a mean square of one.

    Args:
        w: (E, F, D, S).
        roots: of the weights of errors.
        modes: those whose rank may be below their size.
    """
    w = weighted(w, roots)
    kept = tucker(w, {mode: w.shape[mode] for mode in modes}).core.square().double()
    few = math.prod(w.shape[mode] for mode in modes) <= EVERY
    axes = []
    for mode, size in enumerate(w.shape):
        if mode not in modes:
            axis = torch.tensor([size])
        else:
            axis = torch.arange(1, size + 1) if few else candidates(size)
        kept = kept.cumsum(mode).index_select(mode, (axis - 1).to(kept.device))
        axes.append(axis)
    total = float(kept.flatten()[-1])
    ranks_NC = torch.cartesian_prod(*axes)
    sizes_C = torch.tensor(w.shape)
    cost_N = ranks_NC.prod(1) + torch.where(ranks_NC < sizes_C, ranks_NC * sizes_C, 0).sum(1)
    scale = w.numel() / total if total else 0.0
    error_N = (total - kept.flatten().cpu()).clamp(min=0) * scale
    return sized_curve(ranks_NC, cost_N, error_N, w.numel())


def ranks_within(found: SizedCurve, numbers: float) -> tuple[int, ...] | None:
    """The ranks of least error that store at most `numbers`; None if even the smallest do not."""
    affordable = int((found.curve.cost_S[:-1] <= numbers).sum())
    return tuple(found.ranks_NC[affordable - 1].tolist()) if affordable else None
