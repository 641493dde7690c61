"""Factors: the small tensors of a decomposition, which stand for a large one.

Each kind of factors derives from `Factors` and is registered with `FACTORS`; code that counts,
saves, rebuilds, runs or reports weights uses these members only and never asks for the kind.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from tensorllm.errors import UserError
from tensorllm.registry import Registry
from tensorllm.tensors.eigen import all_singular_values
from tensorllm.tensors.unfold import exact_float32, growth, project, project_all

Picture = Literal["core", "product"]
CANCELS = 0.01  # below this share of the energy the difference itself is computed


class Factors(ABC):
    """A factorised tensor.

    Attributes:
        nouns: what reports call the factors of one site and of several, such as `a product` and
            `products`; None: the kind's name and "factors".
        picture: how reports draw the factors: a `core` with a factor for each mode, a `product` of
            two matrices; None: not at all.
        rounding: roughly the squared relative error of `dense()`, over that of each stored tensor,
            if the stored tensors are rounded.
    """

    nouns: ClassVar[tuple[str, str] | None] = None
    picture: ClassVar[Picture | None] = None
    rounding: ClassVar[float] = 2.0

    @abstractmethod
    def dense(self) -> Tensor:
        """The tensor that the factors stand for, computed and returned in float32 or wider."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The stored (and counted) tensors by name; the input of `from_tensors`."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The factors whose `tensors()` these are."""

    @property
    @abstractmethod
    def ranks(self) -> tuple[int, ...]:
        """The ranks, in the order of the decomposed modes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `dense()`; kinds that know it without computing that tensor override this.

        Raises:
            UserError: the ranks of the stored tensors differ (in the kinds here that override it).
        """
        return tuple(self.dense().shape)

    @property
    def kind(self) -> str:
        """The name under which the kind is registered."""
        return FACTORS.name_of(type(self))

    # For reports; the defaults work for any kind.

    @classmethod
    def describe(cls, kind: str, ranks: Sequence[tuple[int, ...]], several: bool) -> str:
        """The factors in words, such as `products of rank 8 to 32`.

        Args:
            kind: the kind's name.
            ranks: those that occur, ascending.
            several: whether the text is about the factors of more than one site.
        """
        one, more = cls.nouns or (f"{kind.replace('-', ' ')} factors",) * 2
        unit = "ranks" if len(ranks[0]) > 1 else "rank"
        texts = [str(r if len(r) > 1 else r[0]) for r in ranks]
        values = texts[0] if len(texts) == 1 else f"{texts[0]} to {texts[-1]}"
        return f"{more if several else one} of {unit} {values}"

    def cuts(self, shape: Sequence[int]) -> dict[int, int | None]:
        """Modes of the tensor whose singular values are worth showing, each with its rank.

        Rank None: the mode is not cut by one. By default the singular values of a matrix, cut at
        the rank if there is only one, and those of every mode of a larger tensor.
        """
        if len(shape) == 2:
            return {0: self.ranks[0] if len(self.ranks) == 1 else None}
        return dict.fromkeys(range(len(shape)))

    def spectrum(self, mode: int) -> Tensor | None:
        """Singular values of the mode's unfolding, computed from the factors; None: unavailable."""
        del mode
        return None

    def residual_share(self, w: Tensor, total: float) -> float | None:
        """||w - dense||² / ||w||², without the dense tensor.

        Args:
            w: the original tensor.
            total: ||w||², above 0.

        Returns:
            None if there is no such way, or if the difference would be lost to cancellation.
        """
        del w, total
        return None

    def slice_errors(self, w: Tensor, modes: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """Norms of w - dense, and of w, for every index of the modes that are not in `modes`.

        Returns:
            None in the cases of `residual_share`.
        """
        del w, modes
        return None

    def as_run(self, *, output: bool) -> "Factors":
        """The same factors in the memory layout of the module that runs them.

        Otherwise loading would copy them out of the memory-mapped file.

        Args:
            output: whether they belong to an output projection.
        """
        del output
        return self

    def plain(self) -> "Factors":
        """The factors in floating point; `self` if they are not quantised."""
        return self

    def quantised_parts(self, name: str) -> dict[str, Tensor]:
        """What is stored for the tensor `name` of `plain()`; empty: that tensor itself."""
        del name
        return {}


# In the group of the compressors: one plugin may hold a strategy and its kind of factors.
FACTORS: Registry[type[Factors]] = Registry("factor kind", group="tensorllm.compressors")


def parameters(factors: Factors) -> int:
    """How many numbers the factors store."""
    return sum(t.numel() for t in factors.tensors().values())


def cast(factors: Factors, dtype: torch.dtype) -> Factors:
    """The same factors with their numbers rounded to `dtype`."""
    rounded = {
        name: t.to(dtype) if t.is_floating_point() else t  # row indices stay integers
        for name, t in factors.tensors().items()
    }
    return type(factors).from_tensors(rounded)


def same_rank(*ranks: int) -> None:
    """Raise a UserError if ranks differ, as in factors from a damaged folder."""
    if len(set(ranks)) > 1:
        raise UserError(f"factors of ranks {' and '.join(map(str, ranks))} do not fit together")


def wide(t: Tensor) -> Tensor:
    """`t` in float32, or in float64 if it already is."""
    return t.to(wide_dtype(t))


def wide_dtype(t: Tensor) -> torch.dtype:
    """Float64 if `t` has it, otherwise float32."""
    return torch.promote_types(t.dtype, torch.float32)


@FACTORS.register("tucker")
@dataclass(frozen=True, eq=False)
class Tucker(Factors):
    """A partial Tucker decomposition: core ×_n U_n over the modes that have a factor.

    Source: Kolda and Bader, "Tensor decompositions and applications", SIAM Review 2009, section 4.

    Attributes:
        core: its mode n has the size of the rank if there is a factor, otherwise of the tensor.
        factors: mode -> matrix (size of the mode, rank) with orthonormal columns.
    """

    nouns = ("a shared Tucker tensor", "shared Tucker tensors")
    picture = "core"
    rounding = 4.0  # of the core and of three factors

    core: Tensor
    factors: dict[int, Tensor]

    def dense(self) -> Tensor:
        # The model width comes last in memory, as in the role matrices that are views of it.
        reverse = range(self.core.ndim - 1, -1, -1)
        w = wide(self.core).permute(*reverse).contiguous().permute(*reverse)
        # This order has the fewest multiply-adds (exchanging two neighbours only adds some).
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
    def shape(self) -> tuple[int, ...]:
        for mode, u in self.factors.items():
            same_rank(self.core.shape[mode], u.shape[1])
        given = {mode: len(u) for mode, u in self.factors.items()}
        return tuple(given.get(mode, size) for mode, size in enumerate(self.core.shape))

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(u.shape[1] for _, u in sorted(self.factors.items()))

    def cuts(self, shape: Sequence[int]) -> dict[int, int | None]:
        del shape
        return {mode: u.shape[1] for mode, u in self.factors.items()}

    def spectrum(self, mode: int) -> Tensor | None:
        return all_singular_values(wide(self.core), mode)

    def residual_share(self, w: Tensor, total: float) -> float | None:
        """(||w||² - 2 <w, dense> + ||dense||²) / ||w||².

        Exact for any factors, rounded ones too, unless the difference is near 0.
        """
        factors = {mode: wide(u) for mode, u in self.factors.items()}
        core = wide(self.core).double()
        own = project_all(core, {n: u.double().mT @ u.double() for n, u in factors.items()})
        cross = float((project_all(w, factors).double() * core).sum())
        share = (total - 2 * cross + float((own * core).sum())) / total
        return share if share > CANCELS else None

    def slice_errors(self, w: Tensor, modes: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        factors = {mode: wide(u) for mode, u in self.factors.items()}
        inside = {n: u for n, u in factors.items() if n in modes}
        outside = {n: u.double().mT for n, u in factors.items() if n not in modes}
        own = project_all(wide(self.core).double(), outside)
        twice = project_all(own, {n: u.double().mT @ u.double() for n, u in inside.items()})
        cross = project_all(w, inside).double()
        norms = torch.linalg.vector_norm(w, dim=tuple(modes), dtype=wide_dtype(w)).double()
        left = norms.square() + ((twice - 2 * cross) * own).sum(tuple(modes))
        if bool((left < CANCELS * norms.square()).any()):
            return None
        return left.sqrt(), norms


@FACTORS.register("low-rank")
@dataclass(frozen=True, eq=False)
class LowRank(Factors):
    """A matrix as `u_IR @ v_RO`; the singular values are split evenly between the two.

    Attributes:
        transposed: both are stored transposed, as `u_t` and `v_t`: the weights of the two linear
            layers of an output projection.
    """

    nouns = ("a product", "products")
    picture = "product"

    u_IR: Tensor
    v_RO: Tensor
    transposed: bool = False

    @exact_float32()
    def dense(self) -> Tensor:
        return wide(self.u_IR) @ wide(self.v_RO)

    def tensors(self) -> dict[str, Tensor]:
        if not self.transposed:
            return {"u": self.u_IR, "v": self.v_RO}
        return {"u_t": self.u_IR.mT, "v_t": self.v_RO.mT}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        if "u" in tensors:
            return cls(tensors["u"], tensors["v"])
        return cls(tensors["u_t"].mT, tensors["v_t"].mT, transposed=True)

    def as_run(self, *, output: bool) -> "LowRank":
        return replace(self, transposed=output)

    @property
    def shape(self) -> tuple[int, ...]:
        same_rank(self.u_IR.shape[1], len(self.v_RO))
        return len(self.u_IR), self.v_RO.shape[1]

    @property
    def ranks(self) -> tuple[int, ...]:
        return (self.u_IR.shape[1],)

    def spectrum(self, mode: int) -> Tensor | None:
        u_RR = torch.linalg.qr(wide(self.u_IR)).R
        v_RR = torch.linalg.qr(wide(self.v_RO).mT).R
        return torch.linalg.svdvals(u_RR @ v_RR.mT)


def low_rank_outline(shape: Sequence[int], rank: int) -> LowRank:
    """The factors of a matrix without values, on the meta device."""
    rows, columns = shape
    with torch.device("meta"):
        return LowRank(torch.empty(rows, rank), torch.empty(rank, columns))


@FACTORS.register("cp")
@dataclass(frozen=True, eq=False)
class CP(Factors):
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
    def shape(self) -> tuple[int, ...]:
        same_rank(len(self.weights_R), *(u.shape[1] for u in self.factors))
        return tuple(len(u) for u in self.factors)

    @property
    def ranks(self) -> tuple[int, ...]:
        return (self.weights_R.numel(),)
