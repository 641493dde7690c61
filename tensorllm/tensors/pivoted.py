"""A low-rank matrix without the r² redundant numbers of two full factors.

The factors of a rank-r matrix are defined up to an invertible r x r matrix. Choosing it so that r
rows of the first factor form the identity leaves r(I + O - r) numbers instead of r(I + O), the
number of degrees of freedom of a rank-r matrix. At full rank that is the matrix itself.

Shapes: I rows, O columns, R rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from tensorllm.tensors.eigen import product_dtype
from tensorllm.tensors.factors import FACTORS, Factors, same_rank, wide, wide_dtype
from tensorllm.tensors.unfold import exact_float32


@FACTORS.register("pivoted-low-rank")
@dataclass(frozen=True, eq=False)
class PivotedLowRank(Factors):
    """R rows of a matrix, and every other row as a linear combination of them.

    Attributes:
        basis_RO: the chosen rows.
        mix_XR: the other I - R rows are `mix_XR @ basis_RO`, in ascending order.
        rows_R: the indices of the chosen rows, int32; they count as parameters.
        transposed: both are stored transposed, as `basis_t` and `mix_t`, so that input projections
            read contiguous memory for each input.
    """

    rounding = 8.0  # errors of the basis enter all rows mixed from it; 3 to 16 were measured

    basis_RO: Tensor
    mix_XR: Tensor
    rows_R: Tensor
    transposed: bool = False

    @exact_float32()
    def dense(self) -> Tensor:
        basis_RO = wide(self.basis_RO)
        w_IO = basis_RO.new_empty(self.rows_R.numel() + len(self.mix_XR), basis_RO.shape[1])
        chosen = self.rows_R.long()
        w_IO[chosen] = basis_RO
        w_IO[_others(chosen, len(w_IO))] = wide(self.mix_XR) @ basis_RO
        return w_IO

    def tensors(self) -> dict[str, Tensor]:
        if not self.transposed:
            return {"basis": self.basis_RO, "mix": self.mix_XR, "rows": self.rows_R}
        basis_OR, mix_RX = (t.mT.contiguous() for t in (self.basis_RO, self.mix_XR))
        return {"basis_t": basis_OR, "mix_t": mix_RX, "rows": self.rows_R}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        if "basis" in tensors:
            return cls(tensors["basis"], tensors["mix"], tensors["rows"])
        return cls(tensors["basis_t"].mT, tensors["mix_t"].mT, tensors["rows"], transposed=True)

    @property
    def shape(self) -> tuple[int, ...]:
        (rank,), (chosen, columns) = self.rows_R.shape, self.basis_RO.shape
        mixed, weights = self.mix_XR.shape
        same_rank(rank, chosen, weights)
        return rank + mixed, columns

    @property
    def ranks(self) -> tuple[int, ...]:
        return (self.rows_R.numel(),)


@exact_float32()
def pivot(u_IR: Tensor, v_RO: Tensor) -> PivotedLowRank:
    """`u_IR @ v_RO` with R of its rows as the basis.

    The rows are the pivots of Gaussian elimination with partial pivoting, P U = L T. They and the
    mixing weights L₂ L₁⁻¹ do not change if U is multiplied by an upper triangular matrix, such as
    the one that makes its columns orthonormal. So the weights stay small (at most 2^(R-1) in
    theory, single digits in practice), and low-precision floats can hold them.

    Computed in float64, and narrower factors of large rank in float32.
    """
    dtype = wide_dtype(u_IR)
    within = torch.promote_types(dtype, product_dtype(u_IR.shape[1]))
    lower_IR, pivots_R, _ = torch.linalg.lu_factor_ex(u_IR.to(within))
    rank = u_IR.shape[1]
    order_I = _order(pivots_R.tolist(), len(u_IR)).to(u_IR.device)
    chosen_R = order_I[:rank].sort().values
    # L has a unit diagonal, so solving with it cannot fail.
    mix = torch.linalg.solve_triangular(
        lower_IR[:rank], lower_IR[rank:], upper=False, left=False, unitriangular=True
    )
    mix_XR = mix[order_I[rank:].argsort()][:, order_I[:rank].argsort()]
    basis_RO = u_IR[chosen_R].to(within) @ v_RO.to(within)
    return PivotedLowRank(basis_RO.to(dtype), mix_XR.to(dtype), chosen_R.int())


def _order(pivots: list[int], rows: int) -> Tensor:
    """The row order after the swaps of an elimination."""
    order = list(range(rows))
    for here, pivot_ in enumerate(pivots):
        other = pivot_ - 1  # LAPACK counts from one
        order[here], order[other] = order[other], order[here]
    return torch.tensor(order)


def pivoted_parameters(shape: tuple[int, int], rank: int) -> int:
    """Numbers that a pivoted matrix stores: R(I + O - R), and the R row indices."""
    return rank * (sum(shape) - rank + 1)


def pivoted_outline(rows: int, columns: int, rank: int, transposed: bool) -> PivotedLowRank:
    """The factors of a matrix without values, on the meta device."""
    basis, mix = (
        torch.empty(n, m, device="meta") for n, m in ((rank, columns), (rows - rank, rank))
    )
    numbers = torch.empty(rank, dtype=torch.int32, device="meta")
    return PivotedLowRank(basis, mix, numbers, transposed)


def _others(chosen_R: Tensor, rows: int) -> Tensor:
    """The row indices that are not chosen, ascending."""
    numbers_I = torch.arange(rows, device=chosen_R.device)
    numbers_I[chosen_R] = rows  # sorted to the end; unlike a mask, the result's size is known
    return numbers_I.sort().values[: rows - len(chosen_R)]
