"""What is kept of unedited layers, within byte budgets: on the model's device, then in files.

Shapes: B rows, T tokens, D model width.
"""

import copy
import tempfile
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Same(NamedTuple):
    """What a module was given, and what it made of it: need not be made again of the same."""

    input_BTD: Tensor
    output_BTD: Tensor


@dataclass(slots=True)
class Kept:
    """One batch below one layer.

    Attributes:
        hidden_BTD: what enters the layer.
        tupled: whether layers return a tuple that begins with the hidden states.
        ffn: of the layer itself, where its FFN reads what no edit of the attention changes.
        below: the cache's entries of the layers below; empty where none was grown.
    """

    hidden_BTD: Tensor
    tupled: bool
    ffn: Same | None = None
    below: list[Any] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        cached = [t for layer in self.below for t in (layer.keys, layer.values)]
        return sum(t.nbytes for t in (self.hidden_BTD, *(self.ffn or ()), *cached))

    def filed(self, folder: Path) -> "Kept":
        """The same, memory-mapped from files that vanish with it."""
        return self._each(lambda t: mapped(t, folder))

    def on(self, device: torch.device) -> "Kept":
        """The same where the model is; itself where it is there already."""
        same = self.hidden_BTD.device == device
        return self if same else self._each(lambda t: t.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Kept":
        below = [copy.copy(layer) for layer in self.below]
        for layer in below:
            layer.keys, layer.values = change(layer.keys), change(layer.values)
        ffn = Same(*map(change, self.ffn)) if self.ffn else None
        return Kept(change(self.hidden_BTD), self.tupled, ffn, below)


def mapped(t: Tensor, folder: Path) -> Tensor:
    """A copy in a file without a name: the space is free again when the tensor is gone."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="activations-") as file:
        file.truncate(max(1, t.nbytes))
        flat = torch.from_file(file.name, shared=True, size=t.numel(), dtype=t.dtype)
        return flat.view(t.shape).copy_(t)


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that may be kept.

    Attributes:
        memory: on the model's device.
        disk: in files of `folder`, when memory is full.
        folder: of these files.
    """

    memory: int = 0
    disk: int = 0
    folder: Path | None = None

    @property
    def bytes(self) -> int:
        return self.memory + self.disk


NOTHING = Budget()


class Store:
    """Kept batches by layer; a new layer's come at the expense of other layers'."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.bytes = {"memory": 0, "disk": 0}
        self._kept: dict[int, dict[Hashable, tuple[Kept, str]]] = {}
        self._lock = threading.Lock()

    def nearest(self, key: Hashable, layer: int, cached: bool) -> tuple[int, Kept | None]:
        """The highest layer up to `layer` below which this batch is known, with its cache if so
        wanted.
        """
        with self._lock:
            for at in sorted(self._kept, reverse=True):
                found = self._kept[at].get(key) if at <= layer else None
                if found is not None and (found[0].below or not cached):
                    return at, found[0]
        return 0, None

    def admit(self, key: Hashable, layer: int, new: Kept) -> None:
        """Keep it where the budget allows."""
        with self._lock:
            mine = self._kept.setdefault(layer, {})
            self._forget(mine.pop(key, None))
            place = self._place(layer, new.bytes)
            if place is None:
                return
            self.bytes[place] += new.bytes
            if place == "disk":
                assert self.budget.folder is not None
                new = new.filed(self.budget.folder)
            mine[key] = (new, place)

    def forget_ffn(self) -> None:
        """FFNs of this model read what edits of the attention change."""
        with self._lock:
            for kept, place in (found for of in self._kept.values() for found in of.values()):
                before = kept.bytes
                kept.ffn = None
                self.bytes[place] -= before - kept.bytes

    def _place(self, layer: int, size: int) -> str | None:
        while True:
            if self.bytes["memory"] + size <= self.budget.memory:
                return "memory"
            if self.bytes["disk"] + size <= self.budget.disk:
                return "disk"
            others = [at for at in self._kept if at != layer and self._kept[at]]
            if not others:
                return None
            for found in self._kept.pop(others[0]).values():
                self._forget(found)

    def _forget(self, found: tuple[Kept, str] | None) -> None:
        if found is not None:
            self.bytes[found[1]] -= found[0].bytes
