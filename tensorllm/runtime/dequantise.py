"""Quantised parameters that are dequantised for each use, by torch's parametrizations."""

import torch
from torch import Tensor, nn

from tensorllm.errors import UserError
from tensorllm.runtime.sites import Order
from tensorllm.tensors.quantised import dequantise


class Dequantised(Tensor):
    """A dequantised parameter. It is made anew for each use, so writing to it has no effect."""

    # Results of operations are plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        return self.as_subclass(Tensor).detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise UserError(
            "adapters cannot be merged into quantised factors, whose sum would have to be rounded; "
            "merge them into the folder that was quantised"
        )


class Dequantise(nn.Module):
    """A parametrization from the stored low-bit tensors to the parameter, in its order of modes."""

    def __init__(self, stored: tuple[Tensor, ...], order: Order) -> None:
        super().__init__()
        self._stored: tuple[Tensor, ...] | None = stored
        self.order = order

    def forward(self, *stored: Tensor) -> Tensor:
        t = dequantise(*stored)
        held = t if self.order is None else t.permute(self.order)
        return held if torch.compiler.is_compiling() else held.as_subclass(Dequantised)

    def right_inverse(self, dense: Tensor) -> tuple[Tensor, ...]:
        """The stored tensors; called once, on registration."""
        assert self._stored is not None, "a quantised parameter is not written to"
        stored, self._stored = self._stored, None
        return stored
