"""A low-rank matrix without the r² numbers that two full factors store twice.

The factors of a rank-r matrix are defined up to an invertible r x r matrix. Choosing it so that r
rows of the first factor are the identity leaves r(I + O - r) numbers in place of r(I + O): as many
as the rank-r matrices have degrees of freedom. At full rank that is the matrix itself.
Shapes: I rows, O columns, R rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from tensorllm.tensors.factors import FACTORS, Factors, same_rank, wide, wide_dtype
from tensorllm.tensors.unfold import exact_float32


@FACTORS.register("pivoted-low-rank")
@dataclass(frozen=True, eq=False)
class PivotedLowRank(Factors):
    """R rows of a matrix, and every other row as a combination of them.

    Attributes:
        basis_RO: the chosen rows.
        mix_XR: the other I - R rows are `mix_XR @ basis_RO`, in ascending order.
        rows_R: the numbers of the chosen rows, int32; they count as parameters.
        transposed: both are stored transposed, as `basis_t` and `mix_t`: input projections then
            read, input by input, what lies together.
    """

    rounding = 8.0  # of a basis: it shows in all rows that are mixed from it; 3 to 16 were measured

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
        same_rank(len(self.rows_R), len(self.basis_RO), self.mix_XR.shape[1])
        return len(self.rows_R) + len(self.mix_XR), self.basis_RO.shape[1]

    @property
    def ranks(self) -> tuple[int, ...]:
        return (self.rows_R.numel(),)


def pivot(u_IR: Tensor, v_RO: Tensor) -> PivotedLowRank:
    """`u_IR @ v_RO` with R of its rows as the basis.

    The rows are the pivots of Gaussian elimination with partial pivoting, P U = L T. They and the
    mixing weights L₂ L₁⁻¹ are the same for U times any upper triangular matrix: an orthonormal
    basis of its columns, say. So the weights stay small (at most 2^(R-1) in theory, single digits
    in practice), and narrow floats can hold them.
    """
    lower_IR, pivots_R, _ = torch.linalg.lu_factor_ex(u_IR.double())
    rank = u_IR.shape[1]
    order_I = _order(pivots_R.tolist(), len(u_IR)).to(u_IR.device)
    chosen_R = order_I[:rank].sort().values
    # L has ones on its diagonal, so solving with it cannot fail.
    mix = torch.linalg.solve_triangular(
        lower_IR[:rank], lower_IR[rank:], upper=False, left=False, unitriangular=True
    )
    mix_XR = mix[order_I[rank:].argsort()][:, order_I[:rank].argsort()]
    basis_RO = u_IR[chosen_R].double() @ v_RO.double()
    dtype = wide_dtype(u_IR)
    return PivotedLowRank(basis_RO.to(dtype), mix_XR.to(dtype), chosen_R.int())


def _order(pivots: list[int], rows: int) -> Tensor:
    """The rows in the order into which the swaps of an elimination bring them."""
    order = list(range(rows))
    for here, pivot_ in enumerate(pivots):
        other = pivot_ - 1  # counted from one
        order[here], order[other] = order[other], order[here]
    return torch.tensor(order)


def pivoted_parameters(shape: tuple[int, int], rank: int) -> int:
    """Numbers that a pivoted matrix stores: R(I + O - R), and the R row numbers."""
    return rank * (sum(shape) - rank + 1)


def pivoted_outline(rows: int, columns: int, rank: int, transposed: bool) -> PivotedLowRank:
    """The factors of a matrix without their numbers, on the meta device."""
    basis, mix = (
        torch.empty(n, m, device="meta") for n, m in ((rank, columns), (rows - rank, rank))
    )
    numbers = torch.empty(rank, dtype=torch.int32, device="meta")
    return PivotedLowRank(basis, mix, numbers, transposed)


def _others(chosen_R: Tensor, rows: int) -> Tensor:
    """The row numbers that are not chosen, ascending."""
    numbers_I = torch.arange(rows, device=chosen_R.device)
    numbers_I[chosen_R] = rows  # sorts behind all that are left; unlike a mask it has a known size
    return numbers_I.sort().values[: rows - len(chosen_R)]
