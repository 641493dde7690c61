"""Running a model layer by layer on calibration text, the original beside the compressed one.

Shapes: B sequences, T positions, D model width, N tokens of a batch, X width of an input.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tensorllm.calibration.sequences import Batch
from tensorllm.calibration.source import LayerSource, block_path


@dataclass(slots=True)
class Call:
    """How one layer was called on one batch, without its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden_BTD: Tensor) -> Tensor:
        """The hidden states after the layer."""
        out = block(hidden_BTD, *self.args, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out


@dataclass
class Blocks:
    """What a model passes its layers on each batch besides hidden states.

    Attributes:
        source: whose embeddings are run once, and none of its layers.
        layers: how many from the first on.
        start: hidden states (B, T, D) before the first layer, one per batch.
        calls: layer -> one call per batch; masks and rotary tables are shared between layers.
    """

    source: LayerSource
    batches: Sequence[Batch]
    layers: int
    start: list[Tensor] = field(default_factory=list)
    calls: dict[int, list[Call]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._device = next(p.device for p in self.source.model.parameters() if not p.is_meta)
        for batch in self.batches:
            # Some models' layers return their hidden states in a tuple, which the model unpacks.
            if not self._record(batch, in_tuple=False) and not self._record(batch, in_tuple=True):
                raise AssertionError("a layer's hidden states changed their shape on the way")

    def run(self, layer: int, block: nn.Module, hidden: Iterable[Tensor]) -> Iterator[Tensor]:
        """The hidden states after the layer, batch by batch."""
        for call, hidden_BTD in zip(self.calls[layer], hidden, strict=True):
            with torch.no_grad():
                yield call.run(block, hidden_BTD)

    def inputs(
        self, layer: int, block: nn.Module, hidden: Iterable[Tensor], path: str
    ) -> Iterator[Tensor]:
        """The inputs (N, X) of one module of the layer, which runs only so far."""
        module = block.get_submodule(path)
        for batch, call, hidden_BTD in zip(self.batches, self.calls[layer], hidden, strict=True):
            handle = module.register_forward_pre_hook(_stop)
            try:
                with torch.no_grad():
                    call.run(block, hidden_BTD)
            except _Reached as reached:
                yield batch.tokens(reached.input)
            finally:
                handle.remove()

    def _record(self, batch: Batch, *, in_tuple: bool) -> bool:
        """Run the model with layers that do nothing but note their calls; False: misunderstood."""
        model: Any = self.source.model
        base = getattr(model, "base_model", model)
        blocks = [model.get_submodule(block_path(self.source.roles, n)) for n in range(self.layers)]
        seen: list[tuple[Tensor, Call]] = []
        for block in blocks:
            block.forward = _passing_on(seen, in_tuple, last=block is blocks[-1])
        extra = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
        mask = batch.mask_BT.to(self._device).long()
        try:
            with torch.no_grad():
                base(input_ids=batch.ids_BT.to(self._device), attention_mask=mask, **extra)
        except _Reached:
            pass
        finally:
            for block in blocks:
                del block.forward
        if any(hidden.shape != seen[0][0].shape for hidden, _ in seen):
            return False
        self.start.append(seen[0][0])
        for layer, (_, call) in enumerate(seen):
            self.calls.setdefault(layer, []).append(call)
        return True


class _Reached(Exception):
    """A module was reached whose input was asked for."""

    def __init__(self, input: Tensor) -> None:
        super().__init__()
        self.input = input


def _stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    raise _Reached(args[0])


def _passing_on(seen: list[tuple[Tensor, Call]], in_tuple: bool, last: bool) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden: Tensor = args[0] if args else kwargs.pop("hidden_states")
        seen.append((hidden, Call(args[1:], kwargs)))
        if last or hidden.shape != seen[0][0].shape:
            raise _Reached(hidden)
        return (hidden,) if in_tuple else hidden

    return forward
