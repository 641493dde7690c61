"""Low-rank approximation where errors have weights, all of it on the side of the model's width.

A map W has one side as wide as the model, which it reads from (input projections) or writes to
(output projections). Its error weighs tr(A E B Eᵀ), A and B covariances of what it reads and of the
gradient at its output. One of both lives at the model's width and is the metric, A or B = L Lᵀ. The
other one is only ever needed propagated through W to the same side: Wᵀ B W is the covariance of
Wᵀ g, W A Wᵀ that of the outputs W x, both measured without forming B or A. The best map of rank r
is then W between the two factors of a projection P: W P for a map that reads, Pᵀ W for one that
writes, with P = (L V)(Vᵀ L⁻¹) and V the leading eigenvectors of Lᵀ C L, C the propagated
covariance. This is the truncated SVD between the roots of A and B, and costs one Cholesky factor
and one eigenproblem of the model's width, however wide the other side is.
Shapes: N the model's width, R rank, S ranks of a curve.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from tensorllm.tensors.eigen import LARGE, eigenvalues, leading_eigenvectors
from tensorllm.tensors.triangular import congruent, raised_cholesky, times_lower

FLOOR = 1e-6  # of the mean variance: that of a direction in which there was no data
LEAST = 1e-15  # the same where nothing is added and rounding made the covariance indefinite
SHORT = 1.0  # the same where there are as many tokens as directions; falls by their cube


def floor_of(width: int, tokens: int) -> float:
    """The floor of a covariance (N, N) estimated from so many tokens.

    A text of few tokens says little of most directions; errors along those that it does not show
    are not free.
    """
    return max(FLOOR, SHORT * (width / max(tokens, 1)) ** 3)


@dataclass(frozen=True, eq=False)
class Metric:
    """A covariance (N, N) with its diagonal raised, in float64 on its own device.

    Attributes:
        floor: of the mean variance, what is added to the diagonal.
    """

    covariance_NN: Tensor
    floor: float = FLOOR

    @cached_property
    def raised(self) -> Tensor:
        """The covariance with the floor added; the identity for zero."""
        raised_NN = self.covariance_NN.to(torch.float64, copy=True)
        mean = float(raised_NN.diagonal().mean())
        raised_NN.diagonal().add_(self.floor * mean if mean > 0 else 1.0)
        return raised_NN

    @cached_property
    def root(self) -> Tensor:
        """The lower Cholesky factor L; the floor is raised tenfold until there is one.

        Raises:
            UserError: the covariance has NaN or Inf.
        """
        mean = float(self.raised.diagonal().mean())
        return raised_cholesky(self.raised, 10 * max(self.floor, LEAST) * mean, 10)

    def weighted(self, covariance_NN: Tensor, mapped_root_NN: Tensor | None = None) -> Tensor:
        """Lᵀ C L (N, N), float64: its eigenvalues are the errors of leaving out single components.

        From order `LARGE` on its products are made in float32, as its eigenvalues are.

        Args:
            mapped_root_NN: T L, where C is propagated through another map T first: Lᵀ Tᵀ C T L.
        """
        dtype = product_dtype(len(covariance_NN))
        size = float(covariance_NN.diagonal().mean()) or 1.0  # float32 may not reach so far down
        whole_NN = self.root if mapped_root_NN is None else mapped_root_NN
        covariance_NN = (covariance_NN.to(whole_NN.device) / size).to(dtype)
        found_NN = congruent(covariance_NN, whole_NN.to(dtype), lower=mapped_root_NN is None)
        return found_NN.double().mul_(size)

    def times_inverse_root(self, v_RN: Tensor) -> Tensor:
        """V L⁻¹ (R, N)."""
        return torch.linalg.solve_triangular(self.root, v_RN, upper=False, left=False)

    def times_root(self, map_NN: Tensor) -> Tensor:
        """T L of a map T (N, N), in `product_dtype`."""
        dtype = product_dtype(len(map_NN))
        return times_lower(map_NN.to(dtype), self.root.to(dtype))


def narrow_root(covariance_NN: Tensor, floor: float) -> Tensor:
    """The root of a `Metric`, for curves: from order `LARGE` on in float32, as eigenvalues are,
    unless rounding makes the covariance indefinite there."""
    mean = float(covariance_NN.diagonal().mean())
    if product_dtype(len(covariance_NN)) == torch.float32 and mean > 0:
        raised_NN = (covariance_NN / mean).float()  # float32 may not reach so far down
        raised_NN.diagonal().add_(floor)
        root_NN, failed = torch.linalg.cholesky_ex(raised_NN)
        if not int(failed):
            return root_NN.mul_(mean**0.5)
    return Metric(covariance_NN, floor).root


class Projection(NamedTuple):
    """A projection `into @ back` of rank R at the model's width; behind a map T, T times it."""

    into_NR: Tensor
    back_RN: Tensor


def projection(
    metric: Metric, covariance_NN: Tensor, rank: int, mapped_root_NN: Tensor | None = None
) -> Projection:
    """The projection of this rank after which a map errs least.

    Args:
        mapped_root_NN: T L (see `Metric.times_root`), where the covariance is propagated through T
            first: Tᵀ C T.
    """
    v_NR = leading_eigenvectors(metric.weighted(covariance_NN, mapped_root_NN), rank)
    return between_roots(metric, v_NR, mapped_root_NN)


def between_roots(metric: Metric, v_NR: Tensor, mapped_root_NN: Tensor | None = None) -> Projection:
    """The projection (L V)(Vᵀ L⁻¹) of an orthonormal basis; behind a map T, (T L V)(Vᵀ L⁻¹)."""
    dtype = product_dtype(len(v_NR))
    whole_NN = metric.root if mapped_root_NN is None else mapped_root_NN
    into_NR = whole_NN.to(dtype) @ v_NR.to(dtype)
    return Projection(into_NR.double(), metric.times_inverse_root(v_NR.mT.contiguous()))


def product_dtype(order: int) -> torch.dtype:
    """Of products beside eigenproblems of this order, which are in float32 from `LARGE` on."""
    return torch.float32 if order >= LARGE else torch.float64


def truncation_errors(weighted_NN: Tensor, ranks: int) -> Tensor:
    """The errors (S,) of the best maps of ranks 1 to S = `ranks`: tail sums of the eigenvalues.

    Args:
        weighted_NN: Lᵀ C L, as `Metric.weighted` gives it.
    """
    values_S = eigenvalues(weighted_NN).clamp(min=0)[:ranks]
    tails_S = values_S.flip(0).cumsum(0).flip(0)[1:]
    return torch.cat((tails_S, tails_S.new_zeros(1)))


def projection_error(weighted_NN: Tensor, v_NR: Tensor) -> float:
    """The error of the map by an orthonormal basis (see `between_roots`)."""
    kept = (v_NR * (weighted_NN @ v_NR)).sum()
    return max(0.0, float(weighted_NN.diagonal().sum() - kept))


def at_equal_cost(target_NN: Tensor, covariance_NN: Tensor, metric_NN: Tensor) -> Tensor:
    """The target T times the number by which it costs by the metric A what the covariance C costs:
    tr(A T) = tr(A C). What costs nothing gives zero."""
    metric = metric_NN.flatten()
    whole = metric @ target_NN.flatten()
    return target_NN * (metric @ covariance_NN.flatten() / whole if whole > 0 else 0.0)


def regression(cross_NN: Tensor, covariance_NN: Tensor, ridge: float) -> Tensor:
    """The (N, N) map T that minimises E|y - T x|² + ridge · mean(E x²) · |T - 1|².

    From order `LARGE` on it is solved for in float32, in which the covariances' products were made:
    what that rounds is as little beside the ridge as what they did.

    Args:
        cross_NN: E[y xᵀ].
        covariance_NN: E[x xᵀ].
    """
    mean = float(covariance_NN.diagonal().mean())
    added = ridge * (mean if mean > 0 else 1.0)
    raised_NN, wanted_NN = covariance_NN.double().clone(), cross_NN.double().clone()
    raised_NN.diagonal().add_(added)
    wanted_NN.diagonal().add_(added)
    dtype = product_dtype(len(raised_NN))
    root_NN = Metric(raised_NN, 0.0).root.to(dtype)
    return torch.cholesky_solve(wanted_NN.mT.to(dtype), root_NN).mT
