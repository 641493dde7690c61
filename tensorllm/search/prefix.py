"""A causal model whose layers below the lowest edited one are run once per batch.

What enters the lowest edited layer, and the keys and values below it, depend on unedited weights
only; they are kept by batch. Everything else (embedding, masks, rotary angles, the layers above)
runs as the model's own code says, so that no architecture needs code of its own.

Shapes: B rows, T tokens, S cached and new tokens, D model width, V vocabulary.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tensorllm.architectures import RoleMatrices
from tensorllm.evaluation.forward import ModelForward, Padded


def layer_modules(model: nn.Module, roles: RoleMatrices) -> list[nn.Module]:
    """The decoder's layers, found where the architecture's row says."""
    stored = roles.architecture.attention[0]
    ending = f".{stored.path}.weight"
    return [
        model.get_submodule(roles.name(i, stored.roles[0]).removesuffix(ending))
        for i in range(roles.layers)
    ]


@dataclass(slots=True)
class Kept:
    """One batch below one layer.

    Attributes:
        hidden_BTD: what enters the layer.
        tupled: whether layers return a tuple that begins with the hidden states.
        below: the cache's entries of the layers below; empty where none was grown.
    """

    hidden_BTD: Tensor
    tupled: bool
    below: list[Any] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        tensors = [self.hidden_BTD] + [
            t for layer in self.below for t in (layer.keys, layer.values)
        ]
        return sum(t.nbytes for t in tensors)


class PrefixForward(ModelForward):
    """`ModelForward` that skips the layers below `lowest` for batches it has seen.

    Args:
        model: any causal transformers model.
        roles: of the model.
        budget: bytes that may be kept, on the model's device; 0 keeps nothing.
    """

    def __init__(self, model: PreTrainedModel, roles: RoleMatrices, budget: int) -> None:
        super().__init__(model)
        self.layers = layer_modules(model, roles)
        self.budget = budget
        self.bytes = 0
        self.lowest = 0
        self.skipped = self.computed = 0  # layers
        self._kept: dict[int, dict[int, Kept]] = {}  # lowest layer -> batch -> what is kept

    def edit_from(self, lowest: int) -> None:
        """From now on, layers below `lowest` are as in the unedited model."""
        self.lowest = lowest

    def __call__(
        self,
        batch: Padded,
        *,
        keep: int,
        mask_BS: Tensor | None = None,
        cache: Any = None,
        grow: bool = False,
        key: int | None = None,
    ) -> tuple[Tensor, Any]:
        def run() -> tuple[Tensor, Any]:
            return super(PrefixForward, self).__call__(
                batch, keep=keep, mask_BS=mask_BS, cache=cache, grow=grow, key=key
            )

        wanted = self.lowest > 0 and key is not None and key >= 0 and cache is None
        if not wanted or not self.budget:
            self.computed += len(self.layers)
            return run()
        assert key is not None
        at, kept = self._nearest(key, grow)
        if kept is not None and at == self.lowest:
            return self._resumed(run, kept, at, grow)
        return self._recorded(run, key, kept, at, grow)

    def _nearest(self, key: int, grow: bool) -> tuple[int, Kept | None]:
        """The highest layer up to `lowest` below which this batch is known."""
        for at in sorted(self._kept, reverse=True):
            kept = self._kept[at].get(key) if at <= self.lowest else None
            if kept is not None and (kept.below or not grow):
                return at, kept
        return 0, None

    def _resumed(self, run: Any, kept: Kept, at: int, grow: bool) -> tuple[Tensor, Any]:
        with skipping(self.layers[:at], kept):
            logits_BNV, cache = run()
        self.skipped += at
        self.computed += len(self.layers) - at
        if grow:
            cache.layers[:at] = [copy.copy(layer) for layer in kept.below]
        return logits_BNV, cache

    def _recorded(
        self, run: Any, key: int, kept: Kept | None, at: int, grow: bool
    ) -> tuple[Tensor, Any]:
        seen: list[Any] = []

        def note_input(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        def note_output(layer: nn.Module, args: Any, output: Any) -> None:
            seen.append(isinstance(output, tuple))

        hooks = [
            self.layers[self.lowest].register_forward_pre_hook(note_input, with_kwargs=True),
            self.layers[-1].register_forward_hook(note_output),
        ]
        try:
            if kept is None:
                self.computed += len(self.layers)
                logits_BNV, cache = run()
            else:
                logits_BNV, cache = self._resumed(run, kept, at, grow)
        finally:
            for hook in hooks:
                hook.remove()
        below = [copy.copy(layer) for layer in cache.layers[: self.lowest]] if grow else []
        self._admit(key, Kept(seen[0], seen[1], below))
        return logits_BNV, cache

    def _admit(self, key: int, new: Kept) -> None:
        """Keep it if the budget allows, at the expense of what other layers left there."""
        mine = self._kept.setdefault(self.lowest, {})
        for at in [at for at in self._kept if at != self.lowest]:
            if self.bytes + new.bytes <= self.budget:
                break
            self.bytes -= sum(kept.bytes for kept in self._kept.pop(at).values())
        old = mine.pop(key, None)
        self.bytes -= old.bytes if old else 0
        if self.bytes + new.bytes <= self.budget:
            mine[key] = new
            self.bytes += new.bytes


@contextmanager
def skipping(layers: Sequence[nn.Module], kept: Kept) -> Iterator[None]:
    """These layers do nothing but hand on what is kept."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (kept.hidden_BTD,) if kept.tupled else kept.hidden_BTD

    with ExitStack() as stack:
        for layer in layers:
            layer.forward = forward
            stack.callback(layer.__dict__.pop, "forward")
        yield


def default_budget(device: torch.device) -> int:
    """A quarter of the memory that is free where the model is."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 4
    import os

    return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) // 4
