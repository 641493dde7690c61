"""A model whose layers below the lowest edited one are run once per batch.

What enters the lowest edited layer, and the keys and values below it, depend on unedited weights
only; so does its FFN where attention and FFN read the same (GPT-J's parallel block). They are kept
by batch, and for generated tokens by all tokens before them (`TokenCache`). Several edits may run
side by side (`lanes`). Everything else (embedding, masks, rotary angles, the layers above) runs as
the model's own code says, so that no architecture needs code of its own.

Shapes: B rows, T tokens, S cached and new tokens, D model width, V vocabulary.
"""

import copy
import os
import threading
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tensorllm.models import RoleMatrices, Stored
from tensorllm.search.activation_cache import ActivationCache, CacheBudget, LayerInput, ModuleCall
from tensorllm.search.token_cache import TokenCache
from tensorllm.tensors.stacking import FFN

T = TypeVar("T")


def layer_modules(model: nn.Module, roles: RoleMatrices) -> list[nn.Module]:
    """The layers, found where the architecture's row says."""
    return [model.get_submodule(roles.layer_path(i)) for i in range(roles.layers)]


def ffn_modules(layers: list[nn.Module], roles: RoleMatrices) -> list[nn.Module | None]:
    """The module of each layer that is its whole FFN, if it is one."""
    return [_ffn_module(layer, roles.stored_in(number)) for number, layer in enumerate(layers)]


def _ffn_module(layer: nn.Module, stored: Sequence[Stored]) -> nn.Module | None:
    parents = {each.path.rpartition(".")[0] for each in stored if set(each.roles) <= set(FFN)}
    path = parents.pop() if len(parents) == 1 else ""  # a layer may have no FFN
    return layer.get_submodule(path) if path else None


@dataclass(slots=True)
class ForwardPass:
    """One pass through the model: what it need not compute, and what it records.

    Attributes:
        skip: layers below are left out; `kept` holds what they would give.
        kept: of layer `skip`.
        stop: layers from this one on are left out, too, and nobody looks at what comes out.
        recorded: by layer of which nothing is kept yet, the hidden states that entered it; None
            until it has run.
        ffns: what their FFNs were given and made.
    """

    skip: int
    kept: LayerInput | None
    recorded: dict[int, Tensor | None]
    stop: int | None = None
    in_tuple: bool = False
    ffns: dict[int, ModuleCall] = field(default_factory=dict)


class EditExtent(NamedTuple):
    """What of a model an edit leaves as it is.

    Attributes:
        lowest: layers below this one; None: all of them.
        ffn: False: the FFN of this one, too.
    """

    lowest: int | None
    ffn: bool


class Prefix:
    """Skips the layers below the lowest edited one for batches that it has seen.

    Args:
        model: any transformers model.
        roles: of the model.
        budget: bytes that may be kept.
        candidates: layers that may be the lowest edited one: what enters them is kept as soon as
            it is computed, where there is room to spare.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        roles: RoleMatrices,
        budget: CacheBudget,
        candidates: Collection[int] = (),
    ) -> None:
        self.layers = layer_modules(model, roles)
        self.ffns = ffn_modules(self.layers, roles)
        self.plain = roles.layout.plain  # else every layer is run
        self.store = ActivationCache(budget)
        self.device = model.device
        self.candidates = frozenset(candidates) - {0}
        self.tokens = TokenCache(self.store, self.candidates)
        self.edits: Sequence[EditExtent] = (EditExtent(0, True),)
        self.skipped = self.computed = 0  # layers
        self._parallel = True  # until an FFN is seen to read what an edit has changed
        self._now = threading.local()  # batches may run side by side

    @contextmanager
    def editing(self, *edits: EditExtent) -> Iterator[None]:
        """In here a pass is one of a model with one of these edits: the first, or that of `at`."""
        self.edits = edits
        with ExitStack() as stack:
            if any(self.active_at(number) for number in range(len(edits))):
                for i, layer in enumerate(self.layers):
                    stack.enter_context(patched(layer, self._layer(i, layer.forward)))
                    whole = self.ffns[i]
                    if whole is not None and self._wants_ffn(i):
                        stack.enter_context(patched(whole, self._ffn(i, whole.forward)))
            yield

    @contextmanager
    def at(self, number: int) -> Iterator[None]:
        """In here, and in this thread, passes are of the model with this edit."""
        self._now.edit = number
        try:
            yield
        finally:
            self._now.edit = 0

    @property
    def _number(self) -> int:
        return getattr(self._now, "edit", 0)

    @property
    def lowest(self) -> int:
        """The lowest edited layer; as many as there are: none is edited."""
        return self.lowest_at(self._number)

    def lowest_at(self, number: int) -> int:
        """The same for one of the edits."""
        lowest = self.edits[number].lowest
        return len(self.layers) if lowest is None else lowest

    @property
    def active(self) -> bool:
        """Whether there is anything to skip, and room to keep it."""
        return self.active_at(self._number)

    def active_at(self, number: int) -> bool:
        """The same for one of the edits."""
        return bool(self.plain and self.lowest_at(number) and self.store.budget.bytes)

    def _wants_ffn(self, layer: int) -> bool:
        """Whether the FFN of a layer makes what it always makes under any of the edits."""
        return layer in self.candidates or any(e.lowest == layer and not e.ffn for e in self.edits)

    def _remembers_ffn(self, layer: int) -> bool:
        """Whether the FFN of a layer makes what it always makes."""
        wanted = layer == self.lowest or layer in self.candidates
        edited = layer == self.lowest and self.edits[self._number].ffn
        return self._parallel and wanted and not edited

    @property
    def skip(self) -> int:
        """Layers that the pass under way leaves out."""
        now = getattr(self._now, "call", None)
        return now.skip if now is not None else 0

    def run(
        self, key: Hashable, forward: Callable[[], tuple[T, Any]], *, grow: bool
    ) -> tuple[T, Any]:
        """A pass of the batch `key`; `forward` gives what is wanted, and the cache if it grows."""
        if key is None or not self.active:
            self.computed += len(self.layers)
            return forward()
        at, kept = self.store.nearest(key, self.lowest, grow)
        call = ForwardPass(at, kept and kept.to(self.device), self._unknown(at, kept))
        wanted, cache = self.run_pass(call, forward)
        if grow and call.kept is not None:
            cache.layers[:at] = [copy.copy(layer) for layer in call.kept.below]
        self._admit(key, call, cache if grow else None)
        return wanted, cache

    def run_pass(self, call: ForwardPass, forward: Callable[[], tuple[T, Any]]) -> tuple[T, Any]:
        """A pass that skips layers and records what enters others, as `call` says."""
        self._now.call = call
        try:
            return forward()
        finally:
            self._now.call = None
            ran = (len(self.layers) if call.stop is None else call.stop) - call.skip
            self.skipped += len(self.layers) - ran
            self.computed += ran

    def _unknown(self, at: int, kept: LayerInput | None) -> dict[int, Tensor | None]:
        """Layers whose input this pass computes and nobody keeps, though it may be of use."""
        wanted = {layer for layer in self.candidates if layer <= self.lowest} | {self.lowest}
        wanted = {layer for layer in wanted if at <= layer < len(self.layers)}
        return dict.fromkeys(wanted if kept is None else wanted - {at})

    def _admit(self, key: Hashable, call: ForwardPass, cache: Any) -> None:
        """Keep what was recorded: of the lowest edited layer, and of others if there is room."""
        for layer in sorted(call.recorded, key=lambda layer: (layer != self.lowest, -layer)):
            hidden_BTD = call.recorded[layer]
            assert hidden_BTD is not None
            below = [copy.copy(entry) for entry in cache.layers[:layer]] if cache else ()
            new = LayerInput(hidden_BTD, call.in_tuple, call.ffns.get(layer), below)
            self.store.add(key, layer, new, spare=layer != self.lowest)

    def _layer(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A layer that returns what is kept while it is skipped, and records its input if asked."""

        def run(*args: Any, **kwargs: Any) -> Any:
            call: ForwardPass | None = getattr(self._now, "call", None)
            if call is not None and call.kept is not None and index < call.skip:
                return (call.kept.hidden_BTD,) if call.kept.in_tuple else call.kept.hidden_BTD
            if call is None:
                return forward(*args, **kwargs)
            entered_BTD = args[0] if args else kwargs["hidden_states"]
            if index in call.recorded:
                call.recorded[index] = entered_BTD
            if call.stop is not None and index >= call.stop:
                return (entered_BTD,) if call.in_tuple else entered_BTD
            output = forward(*args, **kwargs)
            call.in_tuple = isinstance(output, tuple)
            return output

        return run

    def _ffn(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A layer's FFN: not computed again for what it was given before."""

        def run(*args: Any, **kwargs: Any) -> Any:
            call: ForwardPass | None = getattr(self._now, "call", None)
            if call is None or len(args) != 1 or kwargs or not self._remembers_ffn(index):
                return forward(*args, **kwargs)
            same = call.kept.ffn if call.kept is not None and index == call.skip else None
            if same is not None:
                if torch.equal(same.input_BTD, args[0]):
                    return same.output_BTD.clone()  # some layers add to it in place
                self._parallel = False
                self.store.forget_ffn()
            output = forward(*args)
            if index in call.recorded and isinstance(output, Tensor):
                call.ffns[index] = ModuleCall(args[0], output.clone())
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


def default_budget(device: torch.device) -> int:
    """A quarter of the memory that is free where the model is, in bytes; of all that there is where
    the system does not tell what is free, as macOS."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 4
    free = "SC_AVPHYS_PAGES" in os.sysconf_names
    pages = os.sysconf("SC_AVPHYS_PAGES" if free else "SC_PHYS_PAGES")
    return pages * os.sysconf("SC_PAGE_SIZE") // 4
