"""Low-rank approximation where errors have prices: by the input that is seen, and by what they do.

The error E of a matrix costs tr(A E B Eᵀ) with two second moments A and B: one of the input that
the matrix reads, one of what the loss feels at its output. With A = A½ A½ and B = B½ B½ that is
the squared norm of A½ E B½, so the best rank-r matrix is a truncated SVD between the two roots.
Eigen-decompositions with a floor take the place of Cholesky: rank-deficient moments are welcome.
Shapes: I rows, O columns, S the smaller of both, R rank, N any square moment.
"""

from typing import NamedTuple

import torch
from torch import Tensor

FLOOR = 1e-6  # of the mean eigenvalue: what a direction that was never seen counts


class WeightedSVD(NamedTuple):
    """`left @ diag(singular) @ right` is the matrix; the leading parts are the best of each rank.

    Attributes:
        singular_S: their squares are the costs of the components, largest first.
    """

    left_IS: Tensor
    singular_S: Tensor
    right_SO: Tensor

    def errors(self) -> Tensor:
        """(S,): the cost of what ranks 1 to S leave out."""
        tails = self.singular_S.square().flip(0).cumsum(0).flip(0)
        return torch.cat((tails[1:], tails.new_zeros(1)))

    def truncate(self, rank: int) -> tuple[Tensor, Tensor]:
        """The factors (I, R) and (R, O) of the best matrix of this rank."""
        root_R = self.singular_S[:rank].sqrt()
        return self.left_IS[:, :rank] * root_R, root_R[:, None] * self.right_SO[:rank]


def weighted_svd(w_IO: Tensor, rows_II: Tensor, columns_OO: Tensor) -> WeightedSVD:
    """The SVD of `w_IO` between the roots of two second moments, in float64."""
    a_II, a_inverse_II = _roots(rows_II)
    b_OO, b_inverse_OO = _roots(columns_OO)
    u_IS, singular_S, v_SO = torch.linalg.svd(a_II @ w_IO.double() @ b_OO, full_matrices=False)
    return WeightedSVD(a_inverse_II @ u_IS, singular_S, v_SO @ b_inverse_OO)


def regression(cross_MN: Tensor, moment_NN: Tensor, prior_MN: Tensor, ridge: float) -> Tensor:
    """The (M, N) map T that minimises E|y - T x|² + ridge · mean(E x²) · |T - prior|².

    Args:
        cross_MN: E[y xᵀ].
        moment_NN: E[x xᵀ].
    """
    values_N, v_NN = torch.linalg.eigh(moment_NN)
    added = ridge * _mean(values_N)
    right_MN = (cross_MN + added * prior_MN) @ v_NN
    return (right_MN / (values_N.clamp(min=0) + added)) @ v_NN.mT


def _roots(moment_NN: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric root of a second moment, its eigenvalues floored, and the root's inverse."""
    values_N, v_NN = torch.linalg.eigh(moment_NN.double())
    root_N = (values_N.clamp(min=0) + FLOOR * _mean(values_N)).sqrt()
    return (v_NN * root_N) @ v_NN.mT, (v_NN / root_N) @ v_NN.mT


def _mean(values_N: Tensor) -> float:
    """The mean eigenvalue; 1 where nothing was ever seen, so that plain errors count."""
    mean = float(values_N.clamp(min=0).mean())
    return mean if mean > 0 else 1.0
