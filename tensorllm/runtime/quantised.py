"""Factored modules whose factors are held in few bits, and widened for each use.

torch's parametrizations put the narrow tensors in the place of a parameter; what reads the
parameter reads the widened one. That saves memory, not time.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from tensorllm.runtime.swap import Placement
from tensorllm.tensors.quantised import Quantised, widen


class Widen(nn.Module):
    """From the stored tensors to the parameter, its modes in the order in which it is held."""

    def __init__(self, stored: tuple[Tensor, ...], order: tuple[int, ...] | None) -> None:
        super().__init__()
        self._stored: tuple[Tensor, ...] | None = stored
        self.order = order

    def forward(self, *stored: Tensor) -> Tensor:
        t = widen(*stored)
        return t if self.order is None else t.permute(self.order)

    def right_inverse(self, dense: Tensor) -> tuple[Tensor, ...]:
        """What is held from now on; asked for once, on registration."""
        assert self._stored is not None, "a quantised parameter is not written to"
        stored, self._stored = self._stored, None
        return stored


def hold_quantised(
    model: Any, placements: Sequence[Placement], factors: Mapping[str, Quantised]
) -> list[Placement]:
    """Put the narrow tensors of the sites in `factors` in the place of their parameters."""
    out = []
    for place in placements:
        parts = factors[place.site].parts(place.tensor) if place.site in factors else {}
        if not parts:
            out.append(place)
            continue
        path, _, name = place.parameter.rpartition(".")
        module = model.get_submodule(path)
        getattr(module, name).requires_grad_(False)
        narrow = Widen(tuple(parts.values()), place.order)
        parametrize.register_parametrization(module, name, narrow, unsafe=True)
        held = f"{path}.parametrizations.{name}.original"
        out += [Placement(place.site, n, f"{held}{i}") for i, n in enumerate(parts)]
    return out
