"""Covariances of a layer's inputs and gradients, and how they are kept."""

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
        matrices: those of each matrix's own inputs (and outputs' gradients), however wide.
        width: those at the model's width, which say the same of all roles that read one input.
        gradients: those of gradients too.
        whole: roles whose inputs are wanted in full, even where those of all matrices are not.
    """

    matrices: bool
    width: bool
    gradients: bool
    whole: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Covariances:
    """Per layer and set of roles that read the same input. What was not wanted is not there.

    Attributes:
        inputs: E[x xᵀ] of that input.
        sizes: E|x|, per number of that input.
        tokens: that an expert was given, by its keys: (1,).
        gradient_tokens: tokens that gradients were taken of: (1,).
        gradients: E[g gᵀ] over the joint outputs of its roles.
        propagated: through the matrices to the model's width: of input projections E[h hᵀ] of all
            roles' h = Wᵀ g, one role after the other (roles D, roles D); of output projections
            E[y yᵀ] = W E[x xᵀ] Wᵀ of y = W x (D, D).
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
        """By names for a store: in float32, of symmetric matrices one half.

        Args:
            inputs: whether those of the original's own inputs are among them.
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
    """The upper half of a symmetric matrix, row after row; a vector as it is."""
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
STORED = {"propagated": "carried"}  # another name in a store, as folders of earlier fits have it
FIELDS = {stored: field for field, stored in STORED.items()}
VECTORS = ("sizes", "tokens", "gradient_tokens")  # of these; the others are symmetric matrices


def writes(roles: Sequence[str]) -> bool:
    """Whether roles that read one input are output projections."""
    return is_output_projection(roles[0])
