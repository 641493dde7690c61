"""What a decomposition leaves: small objects that stand for a large tensor.

Every kind has the same four members (`Factors`), so that whatever counts, saves or rebuilds weights
never asks which kind it holds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from tensorllm.registry import Registry
from tensorllm.tensors.unfold import exact_float32, project


class Factors(Protocol):
    """A factorised tensor."""

    def dense(self) -> Tensor:
        """The tensor that the factors stand for, computed and returned in float32 or wider."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name; `from_tensors` takes it back."""
        ...

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self: ...

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks, in the order of the modes that are decomposed."""
        ...


FACTORS: Registry[type[Factors]] = Registry("factor kind")


def parameters(factors: Factors) -> int:
    """How many numbers the factors store."""
    return sum(t.numel() for t in factors.tensors().values())


def cast(factors: Factors, dtype: torch.dtype) -> Factors:
    """The same factors with their numbers rounded to `dtype`."""
    rounded = {
        name: t.to(dtype) if t.is_floating_point() else t  # row numbers stay what they are
        for name, t in factors.tensors().items()
    }
    return type(factors).from_tensors(rounded)


def wide(t: Tensor) -> Tensor:
    """`t` in float32, or float64 where it already is."""
    return t.to(wide_dtype(t))


def wide_dtype(t: Tensor) -> torch.dtype:
    """Float32, or float64 where `t` has it."""
    return torch.promote_types(t.dtype, torch.float32)


@FACTORS.register("tucker")
@dataclass(frozen=True, eq=False)
class Tucker:
    """A partial Tucker decomposition: core ×_n U_n over the modes that have a factor.

    Source: Kolda and Bader, "Tensor decompositions and applications", SIAM Review 2009, section 4.

    Attributes:
        core: the core; mode n has size rank n where there is a factor, else the tensor's size.
        factors: mode -> matrix (size of the mode, rank) with orthonormal columns.
    """

    core: Tensor
    factors: dict[int, Tensor]

    def dense(self) -> Tensor:
        # In memory the model width comes last, as in the matrices that are taken out of it.
        reverse = range(self.core.ndim - 1, -1, -1)
        w = wide(self.core).permute(*reverse).contiguous().permute(*reverse)
        # By the pairwise exchange argument this order has the fewest multiply-adds.
        for mode in sorted(self.factors, key=lambda n: growth(self.factors[n].shape)):
            w = project(w, wide(self.factors[mode]).mT, mode)
        return w

    def tensors(self) -> dict[str, Tensor]:
        return {"core": self.core} | {f"factor_{n}": u for n, u in sorted(self.factors.items())}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        factors = {int(k.removeprefix("factor_")): t for k, t in tensors.items() if k != "core"}
        return cls(tensors["core"], factors)

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(u.shape[1] for _, u in sorted(self.factors.items()))


@FACTORS.register("low-rank")
@dataclass(frozen=True, eq=False)
class LowRank:
    """A matrix as `u_IR @ v_RO`; the singular values are shared evenly between the two."""

    u_IR: Tensor
    v_RO: Tensor

    @exact_float32()
    def dense(self) -> Tensor:
        return wide(self.u_IR) @ wide(self.v_RO)

    def tensors(self) -> dict[str, Tensor]:
        return {"u": self.u_IR, "v": self.v_RO}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        return cls(tensors["u"], tensors["v"])

    @property
    def ranks(self) -> tuple[int, ...]:
        return (self.u_IR.shape[1],)


@FACTORS.register("cp")
@dataclass(frozen=True, eq=False)
class CP:
    """A sum of R rank-one tensors: a (size, R) matrix for each of two or more modes, R weights."""

    weights_R: Tensor
    factors: tuple[Tensor, ...]

    @exact_float32()
    def dense(self) -> Tensor:
        w = wide(self.factors[0]) * wide(self.weights_R)
        for u in self.factors[1:-1]:
            w = w.unsqueeze(-2) * wide(u)
        return w @ wide(self.factors[-1]).mT

    def tensors(self) -> dict[str, Tensor]:
        return {"weights": self.weights_R} | {f"factor_{n}": u for n, u in enumerate(self.factors)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        names = [f"factor_{n}" for n in range(len(tensors) - 1)]
        return cls(tensors["weights"], tuple(tensors[name] for name in names))

    @property
    def ranks(self) -> tuple[int, ...]:
        return (self.weights_R.numel(),)


def growth(shape: Sequence[int]) -> float:
    """Order of products with (N, R) factors: ascending to grow, descending to shrink."""
    return 1 / shape[1] - 1 / shape[0]
