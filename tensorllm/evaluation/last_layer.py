"""Run the last layer of a causal model only for the columns whose logits are read.

Shapes: B rows, T tokens, N wanted columns (the last ones), D the width of what a matrix reads or
writes.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices, parameters_of

# Roles whose input is cut to the wanted columns, and roles whose output is padded again.
PICKED, FILLED = ("o", "in", "gate"), ("o", "out")


class LastLayer:
    """Cuts the input of the last layer's `o`, `in` and `gate` to the wanted columns.

    The outputs of `o` and `out` are padded with zeros again. No layer above the last one reads the
    columns whose logits are not wanted, and within it only keys and values come from them, so they
    need no output projection and no FFN.

    The hooks do nothing outside `keeping`, and are removed with this object. A model whose matrices
    are not found where its architecture has them (a factored one) runs as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self._now = threading.local()  # per thread: batches may run in parallel
        for role, module in last_matrices(model):
            handles = []
            if role in PICKED:
                handles.append(module.register_forward_pre_hook(self._narrow()))
            if role in FILLED:
                handles.append(module.register_forward_hook(self._widen()))
            for handle in handles:
                weakref.finalize(self, handle.remove)

    @contextmanager
    def keeping(self, columns: int) -> Iterator[None]:
        """Within the block, and in this thread, only the last `columns` are wanted."""
        self._now.columns, self._now.width = columns, None
        try:
            yield
        finally:
            self._now.columns = None

    def _narrow(self) -> Any:
        now = self._now

        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            columns = getattr(now, "columns", None)
            if columns is None or args[0].ndim != 3:
                return None
            x_BTD = args[0]
            now.width = x_BTD.shape[1]
            return (x_BTD[:, -columns:].contiguous(), *args[1:])  # Conv1D flattens it as a view

        return hook

    def _widen(self) -> Any:
        now = self._now

        def hook(module: nn.Module, args: tuple[Any, ...], y_BND: Tensor) -> Tensor | None:
            if getattr(now, "columns", None) is None or now.width is None or y_BND.ndim != 3:
                return None
            y_BTD = y_BND.new_zeros(y_BND.shape[0], now.width, y_BND.shape[2])
            y_BTD[:, now.width - y_BND.shape[1] :] = y_BND
            return y_BTD

        return hook


def last_matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Role and module of the last layer's matrices whose input may be cut.

    None if the model's matrices are not found, or a layer is more than one attention and one FFN.
    """
    try:
        roles = RoleMatrices(model.config, parameters_of(model))
    except UserError:
        return
    if not roles.layout.plain:
        return
    # Only those present: a layer may have no FFN, or one of another kind.
    for stored in roles.stored_in(roles.layers - 1):
        role = stored.roles[0]  # a module that holds several roles has one input
        if role in {*PICKED, *FILLED}:
            name = roles.name(roles.layers - 1, role).removesuffix(".weight")
            yield role, model.get_submodule(name)
