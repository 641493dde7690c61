"""A matrix cut into blocks of consecutive rows, each with its own low-rank approximation.

If the rows lie near several subspaces, a small rank suffices in each block, where a single
factorisation would need the sum of the ranks (Compress to Impress, arXiv 2510.20800, which clusters
rows this way).

Shapes: I = B J rows in B blocks of J, O columns, R rank of every block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from tensorllm.errors import UserError
from tensorllm.tensors.factors import FACTORS, Factors, LowRank, same_rank, wide
from tensorllm.tensors.unfold import exact_float32


@FACTORS.register("block-low-rank")
@dataclass(frozen=True, eq=False)
class BlockLowRank(Factors):
    """B products `u_JR @ v_RO`, stacked along the rows."""

    nouns = ("a product for each block of rows", "products for each block of rows")

    u_BJR: Tensor
    v_BRO: Tensor

    @classmethod
    def of(cls, blocks: Sequence[LowRank]) -> Self:
        """From the factors of each block, all of the same rank."""
        return cls(torch.stack([b.u_IR for b in blocks]), torch.stack([b.v_RO for b in blocks]))

    @exact_float32()
    def dense(self) -> Tensor:
        return (wide(self.u_BJR) @ wide(self.v_BRO)).flatten(0, 1)

    def tensors(self) -> dict[str, Tensor]:
        return {"u": self.u_BJR, "v": self.v_BRO}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        return cls(tensors["u"], tensors["v"])

    @property
    def shape(self) -> tuple[int, ...]:
        same_rank(self.u_BJR.shape[2], self.v_BRO.shape[1])
        return self.u_BJR.shape[0] * self.u_BJR.shape[1], self.v_BRO.shape[2]

    @property
    def ranks(self) -> tuple[int, ...]:
        return (self.u_BJR.shape[2],)

    def cuts(self, shape: Sequence[int]) -> dict[int, int | None]:
        """The spectrum of the whole matrix, which the ranks of the blocks do not cut."""
        del shape
        return {0: None}


def row_blocks(w_IO: Tensor, blocks: int) -> Sequence[Tensor]:
    """The blocks of consecutive rows, (J, O) each."""
    return w_IO.tensor_split(blocks)


def block_shape(shape: Sequence[int], blocks: int) -> tuple[int, int]:
    """The shape (J, O) of a block.

    Raises:
        UserError: the rows cannot be cut into so many equal blocks.
    """
    rows, columns = shape
    if rows % blocks:
        raise UserError(f"blocks must divide the {rows:,} rows of a matrix, got {blocks}")
    return rows // blocks, columns
