"""Linear operators that stand for role matrices without multiplying out their factors.

Shapes: X inputs of the matrix, Y its outputs, R rank or kept rows, I and D of a role matrix, which
is (Y, X) for input projections and (X, Y) for output projections.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


class LinearOperator(ABC):
    """A role matrix, given by its action on inputs."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """The output (..., Y) for an input (..., X), in the input's dtype."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """The role matrix (I, D)."""

    @abstractmethod
    def is_cheaper(self, tokens: int) -> bool:
        """Whether applying it to so many tokens costs less than forming and applying the matrix."""


class SharedInput:
    """A factor (X, R) shared by maps that read the same input; the product is computed once."""

    def __init__(self, into_XR: Tensor) -> None:
        self.into_XR = into_XR
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not x:
            self._last = x, x @ self.into_XR.to(x.dtype)
        return self._last[1]


@dataclass(frozen=True, eq=False)
class ProductOperator(LinearOperator):
    """The product of two factors: y = x `into` `back`.

    Attributes:
        shared: the first factor.
        back_RY: the second factor.
        writes: whether the role is an output projection.
    """

    shared: SharedInput
    back_RY: Tensor
    writes: bool

    def __call__(self, x: Tensor) -> Tensor:
        return self.shared(x) @ self.back_RY.to(x.dtype)

    def matrix(self) -> Tensor:
        whole_XY = self.shared.into_XR @ self.back_RY
        return whole_XY if self.writes else whole_XY.mT

    def is_cheaper(self, tokens: int) -> bool:
        (rank, outputs), inputs = self.back_RY.shape, len(self.shared.into_XR)
        return tokens * rank * (inputs + outputs) <= (tokens + rank) * inputs * outputs


@dataclass(frozen=True, eq=False)
class RowsOperator(LinearOperator):
    """Some rows of the role matrix; the others are zero.

    Attributes:
        rows_R: their indices.
        values_RD: their values.
        size: rows of the whole matrix.
        writes: whether the role is an output projection, whose rows are inputs.
    """

    rows_R: Tensor
    values_RD: Tensor
    size: int
    writes: bool

    def __call__(self, x: Tensor) -> Tensor:
        values_RD = self.values_RD.to(x.dtype)
        if self.writes:
            return x.index_select(-1, self.rows_R) @ values_RD
        y = x @ values_RD.mT
        return y.new_zeros(*y.shape[:-1], self.size).index_copy(-1, self.rows_R, y)

    def matrix(self) -> Tensor:
        whole_ID = self.values_RD.new_zeros(self.size, self.values_RD.shape[1])
        return whole_ID.index_copy(0, self.rows_R, self.values_RD)

    def is_cheaper(self, tokens: int) -> bool:
        return True


@contextmanager
def replaced_by(module: nn.Module, operator: LinearOperator) -> Iterator[None]:
    """Within the block, use the operator in place of a linear module's matrix; the bias stays."""
    own: Any = module

    def forward(x: Tensor) -> Tensor:
        y, bias = operator(x), getattr(module, "bias", None)
        return y if bias is None else y + bias

    own.forward = forward
    try:
        yield
    finally:
        del own.forward
