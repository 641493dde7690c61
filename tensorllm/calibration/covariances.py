"""Covariances of a layer's inputs and gradients, and their storage format."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tensorllm.tensors.stacking import is_output_projection
from tensorllm.tensors.unfold import mirror

Key = tuple[int, tuple[str, ...]]  # a layer, and roles of it that read the same input


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which covariances a fit needs.

    Attributes:
        matrices: those of each matrix's own inputs (and output gradients), however wide.
        width: those at the model's width, common to all roles that read the same input.
        gradients: those of gradients too.
        whole: roles whose full input covariance is needed, even if `matrices` is false.
    """

    matrices: bool
    width: bool
    gradients: bool
    whole: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Covariances:
    """Covariances per layer and set of roles that read the same input; only those wanted.

    Attributes:
        inputs: E[x xᵀ] of that input.
        sizes: E|x|, per component of that input.
        gradients: E[g gᵀ] over the concatenated outputs of its roles.
        propagated: covariances propagated through the matrices to the model's width. For input
            projections E[h hᵀ] of all roles' h = Wᵀ g, concatenated (roles D, roles D); for output
            projections E[y yᵀ] = W E[x xᵀ] Wᵀ of y = W x (D, D).
        tokens: number of tokens routed to an expert, by its keys: (1,).
        gradient_tokens: number of tokens whose gradients were taken: (1,).
    """

    inputs: dict[Key, Tensor] = field(default_factory=dict)
    sizes: dict[Key, Tensor] = field(default_factory=dict)
    gradients: dict[Key, Tensor] = field(default_factory=dict)
    propagated: dict[Key, Tensor] = field(default_factory=dict)
    tokens: dict[Key, Tensor] = field(default_factory=dict)
    gradient_tokens: dict[Key, Tensor] = field(default_factory=dict)

    def __or__(self, other: "Covariances") -> "Covariances":
        return Covariances(*(a | b for a, b in zip(self._parts, other._parts, strict=True)))

    @property
    def _parts(self) -> tuple[dict[Key, Tensor], ...]:
        return (
            self.inputs,
            self.sizes,
            self.gradients,
            self.propagated,
            self.tokens,
            self.gradient_tokens,
        )

    def tensors(self, *, inputs: bool = True) -> dict[str, Tensor]:
        """The tensors by names for a store: float32, only one half of symmetric matrices.

        Args:
            inputs: whether to include those of the original model's own inputs.
        """
        return {
            f"{STORED.get(what, what)}/{key[0]}/{'-'.join(key[1])}": _packed(t)
            for what, part in zip(PARTS, self._parts, strict=True)
            for key, t in part.items()
            if inputs
            or what in ("gradients", "gradient_tokens")
            or (what == "propagated" and not writes(key[1]))
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], device: torch.device) -> "Covariances":
        out = cls()
        for name, t in tensors.items():
            stored, layer, roles = name.split("/")
            what = FIELDS.get(stored, stored)
            whole = t if what in VECTORS else _unpacked(t)
            getattr(out, what)[int(layer), tuple(roles.split("-"))] = whole.to(device)
        return out


def _packed(t: Tensor) -> Tensor:
    """The upper triangle of a symmetric matrix, row by row; a vector as it is."""
    if t.ndim == 1:
        return t.float()
    return torch.cat([row[number:] for number, row in enumerate(t.float())])


def _unpacked(packed: Tensor) -> Tensor:
    size = math.isqrt(2 * len(packed))
    out_NN = packed.new_empty(size, size)
    for number, row in enumerate(packed.split(list(range(size, 0, -1)))):
        out_NN[number, number:] = row
    return mirror(out_NN)


PARTS = ("inputs", "sizes", "gradients", "propagated", "tokens", "gradient_tokens")
STORED = {"propagated": "carried"}  # its name in stores, kept for folders of earlier versions
FIELDS = {stored: field for field, stored in STORED.items()}
VECTORS = ("sizes", "tokens", "gradient_tokens")  # the others are symmetric matrices


def writes(roles: Sequence[str]) -> bool:
    """Whether roles that read the same input are output projections."""
    return is_output_projection(roles[0])
