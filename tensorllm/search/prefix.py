"""A model whose layers below the lowest edited one are run once per batch.

What enters the lowest edited layer, and the keys and values below it, depend on unedited weights
only; so does its FFN where attention and FFN read the same (GPT-J's parallel block). They are kept
by batch. Everything else (embedding, masks, rotary angles, the layers above) runs as the model's
own code says, so that no architecture needs code of its own.

Shapes: B rows, T tokens, S cached and new tokens, D model width, V vocabulary.
"""

import copy
import os
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tensorllm.architectures import RoleMatrices
from tensorllm.evaluation.forward import ModelForward, Padded
from tensorllm.evaluation.masked import MaskedForward
from tensorllm.search.kept import Budget, Kept, Same, Store

T = TypeVar("T")


def layer_modules(model: nn.Module, roles: RoleMatrices) -> list[nn.Module]:
    """The layers, found where the architecture's row says."""
    stored = roles.architecture.attention[0]
    ending = f".{stored.path}.weight"
    return [
        model.get_submodule(roles.name(i, stored.roles[0]).removesuffix(ending))
        for i in range(roles.layers)
    ]


def ffn_modules(layers: list[nn.Module], roles: RoleMatrices) -> list[nn.Module | None]:
    """The module of each layer that is its whole FFN, if it is one."""
    parents = {stored.path.rpartition(".")[0] for stored in roles.architecture.ffn}
    path = parents.pop()
    return [layer.get_submodule(path) if path and not parents else None for layer in layers]


@dataclass(slots=True)
class _Pass:
    """One pass through the model: what it need not compute, and what it notes.

    Attributes:
        skip: layers below are left out; `kept` holds what they would give.
        note: the layer whose input is noted; None: none.
    """

    skip: int
    kept: Kept | None
    note: int | None
    hidden_BTD: Tensor | None = None
    tupled: bool = False
    ffn: Same | None = None


class Prefix:
    """Skips the layers below the lowest edited one for batches that it has seen.

    Args:
        model: any transformers model.
        roles: of the model.
        budget: bytes that may be kept.
    """

    def __init__(self, model: PreTrainedModel, roles: RoleMatrices, budget: Budget) -> None:
        self.layers = layer_modules(model, roles)
        self.ffns = ffn_modules(self.layers, roles)
        self.store = Store(budget)
        self.device = model.device
        self.lowest = 0
        self.skipped = self.computed = 0  # layers
        self._parallel = True  # until an FFN is seen to read what an edit has changed
        self._remembers_ffn = False
        self._now = threading.local()  # batches may run side by side

    @contextmanager
    def editing(self, lowest: int, *, ffn: bool) -> Iterator[None]:
        """In here, layers below `lowest` are unedited, and its own FFN too unless `ffn`."""
        self.lowest, self._remembers_ffn = lowest, self._parallel and not ffn
        whole = self.ffns[lowest]
        with ExitStack() as stack:
            if lowest and self.store.budget.bytes:
                for i, layer in enumerate(self.layers[: lowest + 1]):
                    stack.enter_context(patched(layer, self._layer(i, layer.forward)))
                if whole is not None and self._remembers_ffn:
                    stack.enter_context(patched(whole, self._ffn(whole.forward)))
            yield

    @property
    def skip(self) -> int:
        """Layers that the pass under way leaves out."""
        now = getattr(self._now, "call", None)
        return now.skip if now is not None else 0

    def run(
        self, key: Hashable, forward: Callable[[], tuple[T, Any]], *, grow: bool
    ) -> tuple[T, Any]:
        """A pass of the batch `key`; `forward` gives what is wanted, and the cache if it grows."""
        if key is None or not self.lowest or not self.store.budget.bytes:
            self.computed += len(self.layers)
            return forward()
        at, kept = self.store.nearest(key, self.lowest, grow)
        known = kept is not None and at == self.lowest
        call = _Pass(at, kept and kept.on(self.device), None if known else self.lowest)
        self._now.call = call
        try:
            wanted, cache = forward()
        finally:
            self._now.call = None
        self.skipped += at
        self.computed += len(self.layers) - at
        if grow and call.kept is not None:
            cache.layers[:at] = [copy.copy(layer) for layer in call.kept.below]
        if not known:
            assert call.hidden_BTD is not None
            below = [copy.copy(layer) for layer in cache.layers[: self.lowest]] if grow else []
            self.store.admit(key, self.lowest, Kept(call.hidden_BTD, call.tupled, call.ffn, below))
        return wanted, cache

    def _layer(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A layer that hands on what is kept while it is skipped, and is noted when it is asked."""

        def run(*args: Any, **kwargs: Any) -> Any:
            call: _Pass | None = getattr(self._now, "call", None)
            if call is not None and call.kept is not None and index < call.skip:
                return (call.kept.hidden_BTD,) if call.kept.tupled else call.kept.hidden_BTD
            output = forward(*args, **kwargs)
            if call is not None and index == call.note:
                call.hidden_BTD = args[0] if args else kwargs["hidden_states"]
                call.tupled = isinstance(output, tuple)
            return output

        return run

    def _ffn(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The FFN of the lowest edited layer: not computed again for what it was given before."""

        def run(*args: Any, **kwargs: Any) -> Any:
            call: _Pass | None = getattr(self._now, "call", None)
            if call is None or len(args) != 1 or kwargs or not self._remembers_ffn:
                return forward(*args, **kwargs)
            same = call.kept.ffn if call.kept is not None and call.note is None else None
            if same is not None:
                if torch.equal(same.input_BTD, args[0]):
                    return same.output_BTD.clone()  # some layers add to it in place
                self._parallel = self._remembers_ffn = False
                self.store.forget_ffn()
            output = forward(*args)
            if call.note is not None and isinstance(output, Tensor):
                call.ffn = Same(args[0], output.clone())
            return output

        return run


@contextmanager
def patched(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module with another `forward`, for a while."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.forward = before


class PrefixForward(ModelForward):
    """A causal model that skips unedited layers."""

    def __init__(self, model: PreTrainedModel, prefix: Prefix) -> None:
        super().__init__(model)
        self.prefix = prefix

    def __call__(
        self, batch: Padded, *, grow: bool = False, key: Hashable = None, **how: Any
    ) -> tuple[Tensor, Any]:
        def forward() -> tuple[Tensor, Any]:
            return super(PrefixForward, self).__call__(batch, grow=grow, key=key, **how)

        return self.prefix.run(key, forward, grow=grow)

    def select(self, cache: Any, rows: Tensor) -> Any:
        """Of layers that are skipped only the length will be asked."""
        narrowed = copy.copy(cache)
        narrowed.layers = [copy.copy(layer) for layer in cache.layers]
        for layer in narrowed.layers[self.prefix.skip :]:
            layer.batch_select_indices(rows)
        return narrowed


class PrefixMaskedForward(MaskedForward):
    """A masked model that skips unedited layers."""

    def __init__(self, model: PreTrainedModel, prefix: Prefix) -> None:
        super().__init__(model)
        self.prefix = prefix

    def __call__(self, ids_BT: Tensor, seen_BT: Tensor, key: Hashable = None) -> Tensor:
        def forward() -> tuple[Tensor, Any]:
            return super(PrefixMaskedForward, self).__call__(ids_BT, seen_BT), None

        return self.prefix.run(key, forward, grow=False)[0]


def default_budget(device: torch.device) -> int:
    """A quarter of the memory that is free where the model is, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 4
    return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) // 4
