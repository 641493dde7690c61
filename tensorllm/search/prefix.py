"""Run the layers below the lowest edited one once per batch, and reuse their results.

What enters the lowest edited layer, and the keys and values below it, depend on unedited weights
only; so does its FFN where attention and FFN read the same input (GPT-J's parallel block). They are
kept by batch, and for generated tokens by all tokens before them (`TokenCache`). Several edits may
run side by side (`lanes`). Everything else (embedding, masks, rotary angles, the layers above) runs
by the model's own code, so that no architecture needs code of its own.

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
    """The model's layers, found by the path in the architecture's layout."""
    return [model.get_submodule(roles.layer_path(i)) for i in range(roles.layers)]


def ffn_modules(layers: list[nn.Module], roles: RoleMatrices) -> list[nn.Module | None]:
    """For each layer the module that is its whole FFN; None if there is no such module."""
    return [_ffn_module(layer, roles.stored_in(number)) for number, layer in enumerate(layers)]


def _ffn_module(layer: nn.Module, stored: Sequence[Stored]) -> nn.Module | None:
    parents = {each.path.rpartition(".")[0] for each in stored if set(each.roles) <= set(FFN)}
    path = parents.pop() if len(parents) == 1 else ""  # a layer may have no FFN
    return layer.get_submodule(path) if path else None


@dataclass(slots=True)
class ForwardPass:
    """One pass through the model: which layers it skips, and what it records.

    Attributes:
        skip: layers below this one are skipped; `kept` holds what they would return.
        kept: the input of layer `skip`.
        recorded: the hidden states that enter these layers, by layer; None until the layer runs.
        stop: layers from this one on are skipped too, and the pass's output is not used.
        in_tuple: whether layers return a tuple whose first item is the hidden states.
        ffns: the FFNs' inputs and outputs in the recorded layers.
    """

    skip: int
    kept: LayerInput | None
    recorded: dict[int, Tensor | None]
    stop: int | None = None
    in_tuple: bool = False
    ffns: dict[int, ModuleCall] = field(default_factory=dict)


class EditExtent(NamedTuple):
    """How far down an edit reaches into the model.

    Attributes:
        lowest: the lowest edited layer; None: no layer is edited.
        ffn: whether the FFN of this layer may change.
    """

    lowest: int | None
    ffn: bool


class Prefix:
    """Skips the layers below the lowest edited one for batches it has seen before.

    Args:
        model: any transformers model.
        roles: of the model.
        budget: bytes of activations that may be kept.
        candidates: layers that may be the lowest edited one: their inputs are kept as soon as they
            are computed, if there is room to spare.
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
        self.plain = roles.layout.plain  # otherwise every layer is run
        self.store = ActivationCache(budget)
        self.device = model.device
        self.candidates = frozenset(candidates) - {0}
        self.tokens = TokenCache(self.store, self.candidates)
        self.edits: Sequence[EditExtent] = (EditExtent(0, True),)
        self.skipped = self.computed = 0  # layers, counted over all passes
        self._parallel = True  # until an FFN's input is seen to depend on the attention's edits
        self._now = threading.local()  # per thread: batches may run in parallel

    @contextmanager
    def editing(self, *edits: EditExtent) -> Iterator[None]:
        """Within the block, passes run under these edits: the first by default (see `at`)."""
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
        """Within the block, and in this thread, passes run under edit `number`."""
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
        """The lowest edited layer; the number of layers if none is edited."""
        return self.lowest_at(self._number)

    def lowest_at(self, number: int) -> int:
        """The lowest edited layer of edit `number`."""
        lowest = self.edits[number].lowest
        return len(self.layers) if lowest is None else lowest

    @property
    def active(self) -> bool:
        """Whether there are layers to skip, and room to keep their results."""
        return self.active_at(self._number)

    def active_at(self, number: int) -> bool:
        """`active` for edit `number`."""
        return bool(self.plain and self.lowest_at(number) and self.store.budget.bytes)

    def _wants_ffn(self, layer: int) -> bool:
        """Whether this layer's FFN output may be reused under any of the edits."""
        return layer in self.candidates or any(e.lowest == layer and not e.ffn for e in self.edits)

    def _remembers_ffn(self, layer: int) -> bool:
        """Whether the current edit leaves this layer's FFN and its input unchanged."""
        wanted = layer == self.lowest or layer in self.candidates
        edited = layer == self.lowest and self.edits[self._number].ffn
        return self._parallel and wanted and not edited

    @property
    def skip(self) -> int:
        """Number of layers that the current pass skips."""
        now = getattr(self._now, "call", None)
        return now.skip if now is not None else 0

    def run(
        self, key: Hashable, forward: Callable[[], tuple[T, Any]], *, grow: bool
    ) -> tuple[T, Any]:
        """Run `forward` on the batch `key`, skipping what is kept of it.

        `forward` returns the result, and the key-value cache if `grow`.
        """
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
        """Run a pass that skips and records layers as `call` says."""
        self._now.call = call
        try:
            return forward()
        finally:
            self._now.call = None
            ran = (len(self.layers) if call.stop is None else call.stop) - call.skip
            self.skipped += len(self.layers) - ran
            self.computed += ran

    def _unknown(self, at: int, kept: LayerInput | None) -> dict[int, Tensor | None]:
        """Layers whose input this pass computes, may be of use later, and is not kept yet."""
        wanted = {layer for layer in self.candidates if layer <= self.lowest} | {self.lowest}
        wanted = {layer for layer in wanted if at <= layer < len(self.layers)}
        return dict.fromkeys(wanted if kept is None else wanted - {at})

    def _admit(self, key: Hashable, call: ForwardPass, cache: Any) -> None:
        """Keep recorded inputs: the lowest edited layer's, and others' if there is room."""
        for layer in sorted(call.recorded, key=lambda layer: (layer != self.lowest, -layer)):
            hidden_BTD = call.recorded[layer]
            assert hidden_BTD is not None
            below = [copy.copy(entry) for entry in cache.layers[:layer]] if cache else ()
            new = LayerInput(hidden_BTD, call.in_tuple, call.ffns.get(layer), below)
            self.store.add(key, layer, new, spare=layer != self.lowest)

    def _layer(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A layer's forward that skips the layer, or records its input, as the pass says."""

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
        """An FFN's forward that reuses the kept output if it is given the same input again."""

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
    """Replace the module's `forward` within the block."""
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
    """A quarter of the free memory of the device, in bytes.

    Of the total memory where the system does not report what is free, such as macOS.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 4
    free = "SC_AVPHYS_PAGES" in os.sysconf_names
    pages = os.sysconf("SC_AVPHYS_PAGES" if free else "SC_PHYS_PAGES")
    return pages * os.sysconf("SC_PAGE_SIZE") // 4
