"""Low-rank approximation where errors have prices: by the input that is seen, and by what they do.

The error E of a matrix costs tr(A E B Eᵀ) with two second moments A and B: one of the input that
the matrix reads, one of what is felt at its output. With A = A½ A½ and B = B½ B½ that is the
squared norm of A½ E B½, so the best rank-r matrix is a truncated SVD between the two roots. It is
found on the smaller side alone: W Q there, Q a projection, so the wider moment needs no root.
Eigen-decompositions with a floor take the place of Cholesky: rank-deficient moments are welcome.
Shapes: I rows, O columns, S the smaller of both, R rank, N any square moment.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

FLOOR = 1e-6  # of the mean eigenvalue: what a direction that was never seen counts


@dataclass(frozen=True, eq=False)
class Metric:
    """A second moment (N, N) with its eigenvalues floored, in float64; roots are taken once.

    Attributes:
        floor: of the mean eigenvalue, what is added to all.
    """

    moment_NN: Tensor
    floor: float = FLOOR

    @cached_property
    def raised(self) -> Tensor:
        """The moment with the floor added; the identity for zero."""
        raised_NN = self.moment_NN.to(torch.float64, copy=True)
        mean = float(raised_NN.diagonal().mean())
        raised_NN.diagonal().add_(self.floor * mean if mean > 0 else 1.0)
        return raised_NN

    @cached_property
    def roots(self) -> tuple[Tensor, Tensor]:
        """The symmetric root and its inverse."""
        values_N, v_NN = torch.linalg.eigh(self.raised)
        # Rounding can leave tiny negative values where the moment has rank 1, say.
        root_N = values_N.clamp(min=self.floor / 2 * float(values_N.mean())).sqrt()
        return (v_NN * root_N) @ v_NN.mT, (v_NN / root_N) @ v_NN.mT


class WeightedSVD(NamedTuple):
    """`left @ right` is the matrix; the leading parts are the best of each rank.

    Attributes:
        costs_S: what each component costs when it is left out, largest first.
    """

    left_IS: Tensor
    costs_S: Tensor
    right_SO: Tensor

    def truncate(self, rank: int) -> tuple[Tensor, Tensor]:
        """The factors (I, R) and (R, O) of the best matrix of this rank."""
        return self.left_IS[:, :rank], self.right_SO[:rank]


def weighted_svd(w_IO: Tensor, rows: Metric, columns: Metric) -> WeightedSVD:
    """The SVD of `w_IO` between the roots of two second moments, in float64."""
    if w_IO.shape[0] < w_IO.shape[1]:
        right_OS, costs_S, left_SI = weighted_svd(w_IO.mT, columns, rows)
        return WeightedSVD(left_SI.mT, costs_S, right_OS.mT)
    w_IO = w_IO.double()
    root_OO, inverse_OO = columns.roots
    costs_S, v_OS = torch.linalg.eigh(_seen(w_IO, rows, root_OO))
    costs_S, v_OS = costs_S.flip(0).clamp(min=0), v_OS.flip(1)
    return WeightedSVD(w_IO @ (root_OO @ v_OS), costs_S, v_OS.mT @ inverse_OO)


def left_out(w_IO: Tensor, rows: Metric, columns: Metric) -> Tensor:
    """(S,): what the best matrices of ranks 1 to S still cost."""
    if w_IO.shape[0] < w_IO.shape[1]:
        return left_out(w_IO.mT, columns, rows)
    costs_S = torch.linalg.eigvalsh(_seen(w_IO.double(), rows, columns.roots[0])).clamp(min=0)
    return torch.cat((costs_S.cumsum(0).flip(0)[1:], costs_S.new_zeros(1)))


def regression(cross_MN: Tensor, moment_NN: Tensor, prior_MN: Tensor, ridge: float) -> Tensor:
    """The (M, N) map T that minimises E|y - T x|² + ridge · mean(E x²) · |T - prior|².

    Args:
        cross_MN: E[y xᵀ].
        moment_NN: E[x xᵀ].
    """
    values_N, v_NN = torch.linalg.eigh(moment_NN)
    mean = float(values_N.clamp(min=0).mean())
    added = ridge * (mean or 1.0)
    right_MN = (cross_MN + added * prior_MN) @ v_NN
    return (right_MN / (values_N.clamp(min=0) + added)) @ v_NN.mT


def _seen(w_IO: Tensor, rows: Metric, root_OO: Tensor) -> Tensor:
    """The Gram matrix (O, O) of the weighted matrix; its eigenvalues are what components cost."""
    scaled_IO = w_IO @ root_OO
    gram_OO = scaled_IO.mT @ rows.raised @ scaled_IO
    return (gram_OO + gram_OO.mT) / 2
