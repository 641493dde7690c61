"""Low-rank approximation under weighted errors, computed entirely at the model's width.

One side of a map W has the model's width: the side that input projections read or output
projections write. An error E of W costs tr(A E B Eᵀ), with A and B the covariances of its inputs
and of the gradient at its outputs. The one at the model's width is the metric, A or B = L Lᵀ. The
other is only needed propagated through W to the same side: Wᵀ B W is the covariance of Wᵀ g, and W
A Wᵀ that of the outputs W x; both are measured without forming B or A. The best map of rank r is
then W with a projection P at the model's width: W P for an input projection, Pᵀ W for an output
projection, with P = (L V)(Vᵀ L⁻¹), V the leading eigenvectors of Lᵀ C L, and C the propagated
covariance. This equals the truncated SVD between the roots of A and B, and costs one Cholesky
factorisation and one eigenproblem of the model's width, however wide the other side is.

Shapes: N the model's width, R rank, S ranks of a curve.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from tensorllm.tensors.eigen import eigenvalues, leading_eigenvectors, product_dtype
from tensorllm.tensors.triangular import congruent, raised_cholesky, times_lower

FLOOR = 1e-6  # variance of a direction without data, relative to the mean variance
LEAST = 1e-15  # the same if nothing is added and rounding made the covariance indefinite
SHORT = 1.0  # the same with as many tokens as directions; falls with the cube of the tokens


def floor_of(width: int, tokens: int) -> float:
    """The floor of a covariance (N, N) estimated from this many tokens.

    A short text says little about most directions, and errors along directions that it does not
    show still cost something.
    """
    return max(FLOOR, SHORT * (width / max(tokens, 1)) ** 3)


@dataclass(frozen=True, eq=False)
class Metric:
    """A covariance (N, N) with its diagonal raised, on its own device.

    Attributes:
        covariance_NN: the covariance.
        floor: added to the diagonal, relative to the mean variance.
    """

    covariance_NN: Tensor
    floor: float = FLOOR

    @cached_property
    def root(self) -> Tensor:
        """The lower Cholesky factor L of the covariance with the floor added.

        In `product_dtype`, or float64 if rounding to that makes the covariance indefinite; the
        floor is then raised tenfold until there is a factor. The identity if all variances are 0.

        Raises:
            UserError: the covariance has NaN or Inf.
        """
        mean = float(self.covariance_NN.diagonal().mean())
        size, floor = (mean, self.floor) if mean > 0 else (1.0, 1.0)
        narrow = product_dtype(len(self.covariance_NN))
        if narrow != torch.float64 and math.isfinite(mean):
            raised_NN = (self.covariance_NN / size).to(narrow)  # unscaled it may underflow
            raised_NN.diagonal().add_(floor)
            root_NN, failed = torch.linalg.cholesky_ex(raised_NN)
            if not int(failed):
                return root_NN.mul_(size**0.5)
        raised_NN = self.covariance_NN.to(torch.float64, copy=True)
        raised_NN.diagonal().add_(floor * size)
        return raised_cholesky(raised_NN, 10 * max(self.floor, LEAST) * size, 10)

    def weighted(self, covariance_NN: Tensor, mapped_root_NN: Tensor | None = None) -> Tensor:
        """Lᵀ C L (N, N), float64; its eigenvalues are the errors of dropping single components.

        Products are in `product_dtype`, as the eigenvalues are.

        Args:
            covariance_NN: C.
            mapped_root_NN: T L, if C is propagated through another map T first: Lᵀ Tᵀ C T L.
        """
        dtype = product_dtype(len(covariance_NN))
        size = float(covariance_NN.diagonal().mean()) or 1.0  # may underflow in float32
        whole_NN = self.root if mapped_root_NN is None else mapped_root_NN
        covariance_NN = (covariance_NN.to(whole_NN.device) / size).to(dtype)
        found_NN = congruent(covariance_NN, whole_NN.to(dtype), lower=mapped_root_NN is None)
        return found_NN.double().mul_(size)

    def times_inverse_root(self, v_RN: Tensor) -> Tensor:
        """V L⁻¹ (R, N), in the dtype of L."""
        return torch.linalg.solve_triangular(self.root, v_RN.to(self.root), upper=False, left=False)

    def times_root(self, map_NN: Tensor) -> Tensor:
        """T L for a map T (N, N), in `product_dtype`."""
        dtype = product_dtype(len(map_NN))
        return times_lower(map_NN.to(dtype), self.root.to(dtype))


class Projection(NamedTuple):
    """A projection `into @ back` of rank R at the model's width; with a map T, T times it."""

    into_NR: Tensor
    back_RN: Tensor


def projection(
    metric: Metric, covariance_NN: Tensor, rank: int, mapped_root_NN: Tensor | None = None
) -> Projection:
    """The projection of this rank that gives the map the least error.

    Args:
        metric: of the map's errors.
        covariance_NN: C, the propagated covariance.
        rank: R.
        mapped_root_NN: T L (see `Metric.times_root`), if the covariance is propagated through T
            first: Tᵀ C T.
    """
    v_NR = leading_eigenvectors(metric.weighted(covariance_NN, mapped_root_NN), rank)
    return between_roots(metric, v_NR, mapped_root_NN)


def between_roots(metric: Metric, v_NR: Tensor, mapped_root_NN: Tensor | None = None) -> Projection:
    """The projection (L V)(Vᵀ L⁻¹) of an orthonormal basis V; with a map T, (T L V)(Vᵀ L⁻¹)."""
    whole_NN = metric.root if mapped_root_NN is None else mapped_root_NN
    return Projection(whole_NN @ v_NR.to(whole_NN), metric.times_inverse_root(v_NR.mT.contiguous()))


def truncation_errors(weighted_NN: Tensor, ranks: int) -> Tensor:
    """The errors (S,) of the best maps of ranks 1 to S = `ranks`: tail sums of the eigenvalues.

    Args:
        weighted_NN: Lᵀ C L, from `Metric.weighted`.
        ranks: S.
    """
    values_S = eigenvalues(weighted_NN).clamp(min=0)[:ranks]
    tails_S = values_S.flip(0).cumsum(0).flip(0)[1:]
    return torch.cat((tails_S, tails_S.new_zeros(1)))


def projection_error(weighted_NN: Tensor, v_NR: Tensor) -> float:
    """The error of the map with this orthonormal basis (see `between_roots`)."""
    whole = float(weighted_NN.diagonal().sum())
    if not whole:
        return 0.0
    shares_NN = (weighted_NN / whole).to(v_NR)  # unscaled it may underflow in float32
    kept = (v_NR * (shares_NN @ v_NR)).sum(dtype=torch.float64)
    return max(0.0, whole * float(1 - kept))


def at_equal_cost(target_NN: Tensor, covariance_NN: Tensor, metric_NN: Tensor) -> Tensor:
    """The target T scaled so that it costs as much by the metric A as the covariance C does.

    That is, tr(A T) = tr(A C). A target without cost gives zero.
    """
    metric = metric_NN.flatten()
    whole = metric @ target_NN.flatten()
    return target_NN * (metric @ covariance_NN.flatten() / whole if whole > 0 else 0.0)


def regression(cross_NN: Tensor, covariance_NN: Tensor, ridge: float) -> Tensor:
    """The (N, N) map T that minimises E|y - T x|² + ridge · mean(E x²) · |T - 1|².

    It is solved in `product_dtype`, as the products of the covariances are: the rounding errors of
    both are small next to the ridge.

    Args:
        cross_NN: E[y xᵀ].
        covariance_NN: E[x xᵀ].
        ridge: weight of the pull towards the identity.
    """
    mean = float(covariance_NN.diagonal().mean())
    added = ridge * (mean if mean > 0 else 1.0)
    raised_NN, wanted_NN = covariance_NN.double().clone(), cross_NN.double().clone()
    raised_NN.diagonal().add_(added)
    wanted_NN.diagonal().add_(added)
    root_NN = Metric(raised_NN, 0.0).root
    return torch.cholesky_solve(wanted_NN.mT.to(root_NN), root_NN).mT
