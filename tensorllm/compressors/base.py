"""What every compression strategy is: it says what is decomposed together, and decomposes it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tensorllm.registry import Registry
from tensorllm.tensors.factors import Factors
from tensorllm.tensors.stacking import ATTENTION, STACKINGS, Geometry


@dataclass(frozen=True, slots=True)
class Site:
    """Role matrices that are decomposed as one tensor.

    Attributes:
        layers: the layers they come from.
        roles: the roles of each layer, in the order in which they are stacked.
        stacking: a name of `STACKINGS`.
    """

    layers: tuple[int, ...]
    roles: tuple[str, ...]
    stacking: str

    @property
    def matrices(self) -> list[tuple[int, str]]:
        """(layer, role) of every matrix, in stacking order."""
        return [(layer, role) for layer in self.layers for role in self.roles]

    @property
    def name(self) -> str:
        """A name for tables and files, such as `layers.3.qkvo` or `layers.0-1.in`."""
        layers = "-".join(str(layer) for layer in self.layers)
        joined = "".join if set(self.roles) <= set(ATTENTION) else "-".join
        return f"layers.{layers}.{joined(self.roles)}"

    def stack(self, w_ID: Sequence[Tensor], geometry: Geometry) -> Tensor:
        """The tensor to decompose, from the role matrices in the order of `matrices`."""
        return STACKINGS[self.stacking].stack(w_ID, geometry)

    def unstack(self, w: Tensor, geometry: Geometry) -> list[Tensor]:
        """The role matrices that the tensor stands for."""
        return STACKINGS[self.stacking].unstack(w, geometry, len(self.matrices))

    def shape(self, geometry: Geometry) -> tuple[int, ...]:
        """The stacked tensor's shape; refuses what cannot be stacked."""
        STACKINGS[self.stacking].check(self.roles, geometry)
        empty = [
            torch.empty(geometry.inner(role), geometry.D, device="meta")
            for _, role in self.matrices
        ]
        return tuple(self.stack(empty, geometry).shape)


class Compressor(ABC):
    """A strategy. Subclasses are frozen dataclasses whose fields are the YAML schema.

    The smallest one implements `compress` alone and then sees the paper's tensor of each layer.

    Attributes:
        source: URL of the paper or code that the method comes from.
    """

    source: ClassVar[str]

    @abstractmethod
    def compress(self, w: Tensor) -> Factors:
        """Factorise one stacked tensor, by default (D, K, 2g+2, G): all attention of a layer."""

    def sites(self, geometry: Geometry, layers: Sequence[int]) -> list["Job"]:
        """What is decomposed together, and by whom; by default each layer's attention by `self`."""
        return [Job(Site((layer,), ATTENTION, "heads"), self) for layer in layers]

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse (UserError) settings that do not fit a stacked tensor of this shape."""
        del shape  # nothing to refuse by default

    def stored_parameters(self, shape: tuple[int, ...]) -> int | None:
        """Numbers that the factors will hold, or None where only the decomposition can tell."""
        del shape
        return None


@dataclass(frozen=True, slots=True)
class Job:
    """One decomposition: a site and the strategy that decomposes it."""

    site: Site
    compressor: Compressor


COMPRESSORS: Registry[type[Compressor]] = Registry("compressor", group="tensorllm.compressors")
