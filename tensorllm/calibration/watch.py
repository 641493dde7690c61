"""Hooks on the modules of a model that add up moments of their inputs and outputs' gradients.

Shapes: N tokens of a batch, X width of an input, Y width of an output.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from tensorllm.calibration.groups import Key
from tensorllm.calibration.sequences import Batch
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices


def module_of(model: nn.Module, roles: RoleMatrices, layer: int, role: str) -> nn.Module:
    """The module that multiplies by the role's matrix."""
    return model.get_submodule(roles.name(layer, role).removesuffix(".weight"))


def output_features(roles: RoleMatrices, layer: int, role: str) -> Tensor | slice:
    """Which outputs of that module are the role's: all, or its part of a fused one."""
    stored = roles.architecture.stored(role)
    if len(stored.roles) == 1:
        return slice(None)
    rows = sum(roles.geometry.inner(r) for r in stored.roles)
    numbers = torch.arange(rows)[:, None].expand(rows, roles.geometry.D).contiguous()
    whole = numbers.mT.contiguous() if stored.transposed else numbers
    return roles.read({roles.name(layer, role): whole}, layer, role)[:, 0]


class Watch:
    """Within its context, second moments (float64) of all batches that run.

    Args:
        keys: layers, and roles of each that read the same input.
        spill: a folder in which the sums live as files instead of in memory.
    """

    def __init__(
        self, model: nn.Module, roles: RoleMatrices, keys: Sequence[Key], spill: Path | None = None
    ) -> None:
        self.model, self.roles, self.keys = model, roles, keys
        self._sums = _Sums(spill)
        self._tokens, self._number = 0, 0
        self._batch: Batch | None = None
        self._gradients: dict[tuple[int, str], Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        self._handles = [handle for key in self.keys for handle in self._hooks(key)]
        return self

    def __exit__(self, *problem: object) -> None:
        for handle in self._handles:
            handle.remove()

    def begin(self, number: int, batch: Batch) -> None:
        """Say which batch runs next."""
        self._number, self._batch = number, batch
        self._tokens += int(batch.mask_BT.sum())

    def add_gradients(self) -> None:
        """Count the gradients that the backward pass of this batch left."""
        for key in self.keys:
            g_NY = torch.cat([self._gradients.pop((key[0], role)) for role in key[1]], dim=1)
            self._sums.add(("gradient", *key), g_NY.mT @ g_NY)

    def means(self) -> tuple[dict[Key, Tensor], dict[Key, Tensor]]:
        """E[x xᵀ] and E[g gᵀ] of every key."""
        inputs, felt = (
            {key: self._sums.sums[what, *key].div_(self._tokens) for key in self.keys}
            for what in ("input", "gradient")
        )
        return inputs, felt

    def _hooks(self, key: Key) -> Iterator[Any]:
        layer, cluster = key

        def see_input(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            assert self._batch is not None
            x_NX = self._batch.tokens(args[0].detach()).double()
            if not torch.isfinite(x_NX).all():
                name = self.roles.name(layer, cluster[0]).removesuffix(".weight")
                raise UserError(
                    f"the input of {name} has NaN or Inf in calibration batch {self._number}"
                )
            self._sums.add(("input", *key), x_NX.mT @ x_NX)

        first = module_of(self.model, self.roles, layer, cluster[0])
        yield first.register_forward_hook(see_input)
        for role in cluster:
            module = module_of(self.model, self.roles, layer, role)
            yield module.register_forward_hook(self._output_hook(layer, role))

    def _output_hook(self, layer: int, role: str) -> Any:
        features = output_features(self.roles, layer, role)

        def keep(gradient: Tensor) -> None:
            assert self._batch is not None
            self._gradients[layer, role] = self._batch.tokens(gradient)[:, features].float()

        def see_output(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(keep)

        return see_output


class _Sums:
    """Sums in float64, in memory or in files."""

    def __init__(self, spill: Path | None) -> None:
        self.spill = spill
        self.sums: dict[tuple[Any, ...], Tensor] = {}
        if spill is not None:
            spill.mkdir(parents=True, exist_ok=True)

    def add(self, key: tuple[Any, ...], product: Tensor) -> None:
        if key not in self.sums:
            self.sums[key] = self._zeros(product.shape)
        self.sums[key].add_(product.to(self.sums[key].device, torch.float64))

    def _zeros(self, shape: torch.Size) -> Tensor:
        if self.spill is None:
            return torch.zeros(shape, dtype=torch.float64)
        path = self.spill / f"moment-{len(self.sums)}.bin"
        file = torch.from_file(str(path), shared=True, size=shape.numel(), dtype=torch.float64)
        return file.zero_().view(shape)
