"""A tensor that is not decomposed, as factors: for rounding without truncation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from tensorllm.tensors.factors import FACTORS, Factors, wide


@FACTORS.register("whole")
@dataclass(frozen=True, eq=False)
class Whole(Factors):
    """The tensor itself."""

    nouns = ("a whole matrix", "whole matrices")
    rounding = 1.0

    w: Tensor

    def dense(self) -> Tensor:
        return wide(self.w)

    def tensors(self) -> dict[str, Tensor]:
        return {"w": self.w}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        return cls(tensors["w"])

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.w.shape)

    @property
    def ranks(self) -> tuple[int, ...]:
        return (min(self.w.shape),)
