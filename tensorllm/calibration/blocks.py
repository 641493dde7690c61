"""Running a model block by block on calibration text, the original beside the compressed one.

Shapes: B sequences, T positions, D model width, N tokens of a batch, X width of an input.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tensorllm.architectures import RoleMatrices
from tensorllm.calibration.sequences import Batch


@dataclass(slots=True)
class Call:
    """How one block was called on one batch, without its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Blocks:
    """The blocks of a model, with what the model passes them besides hidden states.

    Attributes:
        start: hidden states (B, T, D) before the first block, one per batch.
        calls: layer -> one call per batch; masks and rotary tables are shared between layers.
    """

    model: nn.Module
    roles: RoleMatrices
    batches: Sequence[Batch]
    start: list[Tensor] = field(default_factory=list)
    calls: dict[int, list[Call]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """One pass through the whole model records all calls."""
        handles = [
            self.block(layer).register_forward_pre_hook(self._recorder(layer), with_kwargs=True)
            for layer in range(self.roles.layers)
        ]
        base: Any = getattr(self.model, "base_model", self.model)
        device = next(self.model.parameters()).device
        try:
            with torch.no_grad():
                for batch in self.batches:
                    mask = batch.mask_BT.to(device).long()
                    extra = {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}
                    base(input_ids=batch.ids_BT.to(device), attention_mask=mask, **extra)
        finally:
            for handle in handles:
                handle.remove()

    def path(self, layer: int) -> str:
        """The block's name in the model."""
        stored = self.roles.architecture.stored("q")
        return self.roles.name(layer, "q").removesuffix(f".{stored.path}.weight")

    def block(self, layer: int) -> nn.Module:
        return self.model.get_submodule(self.path(layer))

    def copy(self, layer: int) -> tuple[nn.Module, dict[str, Tensor]]:
        """The block to be compressed, and its parameters by their names in the model."""
        block = copy.deepcopy(self.block(layer))
        prefix = self.path(layer)
        return block, {f"{prefix}.{name}": p.data for name, p in block.named_parameters()}

    def run(self, layer: int, block: nn.Module, hidden: Sequence[Tensor]) -> Iterator[Tensor]:
        """The hidden states after the block, batch by batch."""
        for call, hidden_BTD in zip(self.calls[layer], hidden, strict=True):
            with torch.no_grad():
                out = block(hidden_BTD, *call.args, **call.kwargs)
            yield out[0] if isinstance(out, tuple) else out

    def run_watched(
        self, layer: int, hidden: Sequence[Tensor], paths: Sequence[str]
    ) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """The original block's outputs, and the inputs (N, X) of its modules at `paths`."""
        block = self.block(layer)
        seen: dict[str, list[Tensor]] = {path: [] for path in paths}
        handles = [
            block.get_submodule(path).register_forward_pre_hook(
                lambda module, args, path=path: seen[path].append(args[0])
            )
            for path in paths
        ]
        try:
            outputs = list(self.run(layer, block, hidden))
        finally:
            for handle in handles:
                handle.remove()
        return outputs, {path: self._tokens(inputs) for path, inputs in seen.items()}

    def inputs(
        self, layer: int, block: nn.Module, hidden: Sequence[Tensor], path: str
    ) -> Iterator[Tensor]:
        """The inputs (N, X) of one module of the block, which runs only so far."""
        module = block.get_submodule(path)
        for number, batch in enumerate(self.batches):
            handle = module.register_forward_pre_hook(_stop)
            try:
                call = self.calls[layer][number]
                with torch.no_grad():
                    block(hidden[number], *call.args, **call.kwargs)
            except _Reached as reached:
                yield batch.tokens(reached.input)
            finally:
                handle.remove()

    def _tokens(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        both = zip(inputs, self.batches, strict=True)
        return [batch.tokens(x) for x, batch in both]

    def _recorder(self, layer: int) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if layer == 0:
                self.start.append(hidden)
            self.calls.setdefault(layer, []).append(Call(args[1:], kwargs))

        return record


class _Reached(Exception):
    """A module was reached whose input was asked for."""

    def __init__(self, input: Tensor) -> None:
        super().__init__()
        self.input = input


def _stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    raise _Reached(args[0])
