"""A matrix of which only some rows are kept; the others are zero.

If the rows are dimensions that two matrices share (FFN channels, dimensions of a head), both become
narrower, without another matrix product.

Shapes: I rows, O columns, R rows that are kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from tensorllm.tensors.factors import FACTORS, Factors, wide


@FACTORS.register("kept-rows")
@dataclass(frozen=True, eq=False)
class KeptRows(Factors):
    """R rows of a matrix, possibly refitted to make up for the dropped ones.

    Attributes:
        values_RO: the kept rows, in ascending order of their indices.
        kept_I: 1 for kept rows, 0 for others, uint8; counts as parameters.
    """

    nouns = ("rows that are kept", "rows that are kept")
    rounding = 1.0

    values_RO: Tensor
    kept_I: Tensor

    @classmethod
    def of(cls, rows_R: Tensor, values_RO: Tensor, size: int) -> Self:
        """From the indices of the kept rows, in any order, and the number of all rows."""
        kept_I = torch.zeros(size, dtype=torch.uint8, device=rows_R.device)
        kept_I[rows_R] = 1
        return cls(values_RO[rows_R.argsort()].contiguous(), kept_I)

    def rows(self) -> Tensor:
        """The indices of the kept rows, ascending."""
        return torch.argsort(self.kept_I, descending=True, stable=True)[: len(self.values_RO)]

    def dense(self) -> Tensor:
        values_RO = wide(self.values_RO)
        w_IO = values_RO.new_zeros(len(self.kept_I), values_RO.shape[1])
        return w_IO.index_copy(0, self.rows(), values_RO)

    def tensors(self) -> dict[str, Tensor]:
        return {"rows": self.values_RO, "kept": self.kept_I}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        return cls(tensors["rows"], tensors["kept"])

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.kept_I), self.values_RO.shape[1]

    @property
    def ranks(self) -> tuple[int, ...]:
        return (len(self.values_RO),)


def kept_rows_outline(rows: int, columns: int, kept: int) -> KeptRows:
    """`kept` rows of a matrix without values, on the meta device."""
    of_rows = torch.empty(rows, dtype=torch.uint8, device="meta")
    return KeptRows(torch.empty(kept, columns, device="meta"), of_rows)
