"""Cache of the unedited layers' activations, within byte budgets: device memory first, then disk.

Shapes: B rows, T tokens, D model width.
"""

import copy
import tempfile
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tensorllm.environment import name_in_utf8

Change = Callable[[Tensor], Tensor]


class ModuleCall(NamedTuple):
    """A module's input and output, kept so that the same input need not be computed again."""

    input_BTD: Tensor
    output_BTD: Tensor


@dataclass(frozen=True, slots=True)
class LayerInput:
    """The input of one layer for one batch.

    Attributes:
        hidden_BTD: the hidden states that enter the layer.
        in_tuple: whether layers return a tuple whose first item is the hidden states.
        ffn: the FFN's input and output in this layer, where edits of the attention cannot change
            its input.
        below: the key-value cache's entries of the layers below; empty if no cache was built.
    """

    hidden_BTD: Tensor
    in_tuple: bool
    ffn: ModuleCall | None = None
    below: Sequence[Any] = field(default=())

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (self.hidden_BTD, *(self.ffn or ()))) + cached(self.below)

    def to(self, device: torch.device) -> "LayerInput":
        """Move all tensors to `device`; returns self if they are already there."""
        same = self.hidden_BTD.device == device
        return self if same else self.map(lambda t: t.to(device))

    def map(self, change: Change) -> "LayerInput":
        """Apply `change` to every tensor."""
        ffn = ModuleCall(*map(change, self.ffn)) if self.ffn else None
        below = [_changed(layer, change) for layer in self.below]
        return LayerInput(change(self.hidden_BTD), self.in_tuple, ffn, below)


def cached(layers: Sequence[Any]) -> int:
    """Bytes of these layers' key-value cache entries."""
    return sum(t.nbytes for layer in layers for t in (layer.keys, layer.values))


def _changed(layer: Any, change: Change) -> Any:
    new = copy.copy(layer)
    new.keys, new.values = change(layer.keys), change(layer.values)
    return new


def mapped(t: Tensor, folder: Path) -> Tensor:
    """Copy a tensor into an unnamed file; its disk space is freed with the tensor.

    Raises:
        OSError: the disk is full. (Writing through the memory map would kill the process instead.)
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix="activations-") as file:
        file.write(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        flat = torch.from_file(name_in_utf8(file), shared=True, size=t.numel(), dtype=t.dtype)
        return flat.view(t.shape)


@dataclass(frozen=True, slots=True)
class CacheBudget:
    """How many bytes of activations may be kept.

    Attributes:
        memory: bytes on the model's device.
        disk: bytes in files in `folder`, used once memory is full.
        folder: where these files go.
    """

    memory: int = 0
    disk: int = 0
    folder: Path | None = None

    @property
    def bytes(self) -> int:
        return self.memory + self.disk


NO_CACHE = CacheBudget()


class ActivationCache:
    """LayerInput batches by layer. The layers of a batch share one copy of its key-value cache."""

    def __init__(self, budget: CacheBudget) -> None:
        self.budget = budget
        self.bytes = {"memory": 0, "disk": 0}
        self._kept: dict[int, dict[Hashable, tuple[LayerInput, str]]] = {}
        self._below: dict[Hashable, list[tuple[Any, str]]] = {}  # from the first layer up
        self._lock = threading.Lock()

    def nearest(self, key: Hashable, layer: int, grown: bool) -> tuple[int, LayerInput | None]:
        """The highest layer up to `layer` whose input for this batch is kept, and that input.

        With `grown`, only if the key-value cache below the layer is kept too. (0, None) if nothing
        is kept.
        """
        with self._lock:
            below = [entry for entry, _ in self._below.get(key, ())]
            for at in sorted(self._kept, reverse=True):
                found = self._kept[at].get(key) if at <= layer else None
                if found is not None and (not grown or len(below) >= at):
                    return at, replace(found[0], below=below[:at])
        return 0, None

    def add(self, key: Hashable, layer: int, new: LayerInput, *, spare: bool = False) -> None:
        """Keep a layer's input if it fits the budget; unless `spare`, evict others' for it."""
        with self._lock:
            mine = self._kept.setdefault(layer, {})
            if key in mine:
                self._forget(*mine.pop(key))
            place, more = self._place(key, layer, new, spare)
            if place is None:
                return
            new = replace(new, below=more)
            if place == "disk":
                assert self.budget.folder is not None
                folder = self.budget.folder
                try:
                    new = new.map(lambda t: mapped(t, folder))
                except OSError:  # less room than the budget says: recompute it later
                    return
            self.bytes[place] += new.bytes
            self._below.setdefault(key, []).extend((entry, place) for entry in new.below)
            mine[key] = (replace(new, below=()), place)

    def reserve(self, size: int) -> bool:
        """Reserve `size` more bytes of memory; returns whether they were available."""
        with self._lock:
            free = self.bytes["memory"] + size <= self.budget.memory
            self.bytes["memory"] += size * free
            return free

    def forget_ffn(self) -> None:
        """Drop all kept FFN outputs: this model's FFNs read what edits of the attention change."""
        with self._lock:
            for of_layer in self._kept.values():
                for key, (kept, place) in of_layer.items():
                    of_layer[key] = (replace(kept, ffn=None), place)
                    self.bytes[place] -= kept.bytes - of_layer[key][0].bytes

    def _place(
        self, key: Hashable, layer: int, new: LayerInput, spare: bool
    ) -> tuple[str | None, Sequence[Any]]:
        """Where there is room ("memory", "disk", None), and the cache entries not kept yet."""
        while True:
            more = new.below[len(self._below.get(key, ())) :]
            size = replace(new, below=more).bytes
            if self.bytes["memory"] + size <= self.budget.memory:
                return "memory", more
            if self.bytes["disk"] + size <= self.budget.disk:
                return "disk", more
            others = [at for at in self._kept if at != layer and self._kept[at]]
            never = size > max(self.budget.memory, self.budget.disk)
            if spare or never or not others:
                return None, more
            self._forget_layer(others[0])

    def _forget_layer(self, layer: int) -> None:
        for key, found in self._kept.pop(layer).items():
            self._forget(*found)
            highest = max((at for at in self._kept if key in self._kept[at]), default=0)
            entries = self._below.get(key, [])
            for entry, place in entries[highest:]:
                self.bytes[place] -= cached([entry])
            del entries[highest:]

    def _forget(self, kept: LayerInput, place: str) -> None:
        self.bytes[place] -= kept.bytes
