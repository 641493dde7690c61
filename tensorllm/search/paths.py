"""What unedited layers make of generated tokens, kept by all that was read before and with each.

Trials answer much as the original and as each other do. Where they do, the layers below the lowest
edited one need not be run again: they saw the same tokens. That is exact, whatever is edited.

Shapes: B rows, G heads, K width of a head, D model width, R tokens that are kept.
"""

import copy
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tensorllm.evaluation.forward import Path
from tensorllm.search.activation_cache import ActivationCache

LEAST = 256  # tokens that room is made for at once
SHARE = 0.5  # of the memory at most: prompts are worth more
ORDINARY = (DynamicLayer, DynamicSlidingWindowLayer)  # keys and values, and nothing else


class Shortened(NamedTuple):
    """A cache whose lowest layers lack the last columns, and pretend that they do not.

    Attributes:
        cache: as the layers above need it.
        below: the entries of the lowest layers, without those columns.
        columns: what stands in them: of each row the token's place among the `Paths`.
    """

    cache: Any
    below: Sequence[Any]
    columns: Sequence[Tensor] = ()

    def select(self, rows: Tensor) -> "Shortened":
        """The same of these rows."""
        changed, lowest = copy.copy(self.cache), len(self.below)
        changed.layers = [_pretending(entry, 0, len(rows)) for entry in self.cache.layers[:lowest]]
        changed.layers += [_selected(entry, rows) for entry in self.cache.layers[lowest:]]
        below = [_selected(entry, rows) for entry in self.below]
        return Shortened(changed, below, [places_B[rows] for places_B in self.columns])


class Paths:
    """Tokens by their paths, with what enters each candidate layer and the keys and values below.

    Args:
        store: whose budget of memory this shares.
        candidates: layers that may be the lowest edited one.
    """

    def __init__(self, store: ActivationCache, candidates: Collection[int]) -> None:
        self.store = store
        self.candidates = frozenset(candidates)
        self.tupled = False  # whether layers return a tuple
        self.bytes = 0
        self._places: dict[Path, int] = {}
        self._depths: list[int] = []  # up to which candidate all is known
        self._hidden_RD: dict[int, Tensor] = {}
        self._below: list[tuple[Tensor, Tensor]] = []  # (R, G, K) each
        self._lock = threading.Lock()

    def places(self, paths: Sequence[Path | None], layer: int) -> list[int | None]:
        """Where each is kept, if it is known up to this layer."""
        if layer not in self.candidates:
            return [None] * len(paths)
        found = (None if path is None else self._places.get(path) for path in paths)
        return [None if at is None or self._depths[at] < layer else at for at in found]

    def hidden(self, layer: int, places_B: Tensor) -> Tensor:
        """What enters a layer, (B, 1, D)."""
        return self._hidden_RD[layer][places_B][:, None]

    def admit(
        self,
        paths: Sequence[Path | None],
        depth: int,
        hidden: Mapping[int, Tensor],
        layers: Sequence[Any],
    ) -> None:
        """Keep the last column of a pass, of the rows that have a path.

        Args:
            depth: the layer up to which nothing was edited.
            hidden: what entered the candidates up to it, (B, 1, D).
            layers: the cache's entries of the layers below it.
        """
        if not all(type(entry) in ORDINARY and entry.is_initialized for entry in layers):
            return
        with self._lock:
            rows, places = [], []
            for row, path in enumerate(paths):
                if path is None:
                    continue
                at = self._places.get(path, len(self._depths))
                known = at < len(self._depths)
                if known and self._depths[at] >= depth:
                    continue
                if not self._room(at + 1, hidden, layers):
                    break
                if not known:
                    self._depths.append(-1)
                rows.append(row)
                places.append((at, path))
            if not rows:
                return
            device = next(iter(hidden.values())).device
            from_B = torch.tensor(rows, device=device)
            to_B = torch.tensor([at for at, _ in places], device=device)
            for layer, hidden_B1D in hidden.items():
                self._hidden_RD[layer][to_B] = hidden_B1D[from_B, -1]
            for kept, entry in zip(self._below, layers, strict=False):
                for kept_RGK, new_BGSK in zip(kept, (entry.keys, entry.values), strict=True):
                    kept_RGK[to_B] = new_BGSK[from_B, :, -1]
            for at, path in places:  # last: others may look at any time
                self._depths[at] = depth
                self._places[path] = at

    def _room(self, count: int, hidden: Mapping[int, Tensor], layers: Sequence[Any]) -> bool:
        """Whether there is room for so many tokens up to these layers, made where it may be."""
        for layer, hidden_B1D in hidden.items():
            shape = (hidden_B1D.shape[-1],)
            room = self._grown(self._hidden_RD.get(layer), count, shape, hidden_B1D)
            if room is None:
                return False
            self._hidden_RD[layer] = room
        for at, entry in enumerate(layers):
            old = self._below[at] if at < len(self._below) else (None, None)
            new = []
            for kept, tensor in zip(old, (entry.keys, entry.values), strict=True):
                room = self._grown(kept, count, (tensor.shape[1], tensor.shape[3]), tensor)
                if room is None:
                    return False
                new.append(room)
            self._below[at:] = [(new[0], new[1]), *self._below[at + 1 :]]
        return True

    def _grown(
        self, old: Tensor | None, count: int, shape: tuple[int, ...], like: Tensor
    ) -> Tensor | None:
        have = 0 if old is None else len(old)
        if old is not None and have >= count:
            return old
        size = max(LEAST, have * 3 // 2, count)
        more = (size - have) * torch.Size(shape).numel() * like.element_size()
        most = SHARE * self.store.budget.memory
        if self.bytes + more > most or not self.store.reserve(more):
            return None
        self.bytes += more
        new = like.new_empty(size, *shape)
        if old is not None:
            new[:have] = old
        return new

    def shortened(self, cache: Any, below: int) -> Shortened:
        """A cache as one whose lowest layers may lack columns."""
        if isinstance(cache, Shortened):
            return cache
        real = list(cache.layers[:below])
        changed = copy.copy(cache)
        changed.layers = [_pretending(entry, 0) for entry in real] + list(cache.layers[below:])
        return Shortened(changed, real)

    def read(self, shortened: Shortened, places_B: Tensor) -> Shortened:
        """After one more column, which the upper layers have added themselves."""
        cache, below = shortened.cache, len(shortened.below)
        cache.layers[:below] = [_pretending(entry, 1) for entry in cache.layers[:below]]
        return shortened._replace(columns=[*shortened.columns, places_B])

    def whole(self, cache: Any) -> Any:
        """A cache whose layers have all columns."""
        if not isinstance(cache, Shortened):
            return cache
        if not cache.columns:
            layers = cache.below
        else:
            places_BC = torch.stack(list(cache.columns), 1)
            layers = [
                _extended(entry, *(kept_RGK[places_BC].transpose(1, 2) for kept_RGK in kept))
                for entry, kept in zip(cache.below, self._below, strict=False)
            ]
        cache.cache.layers[: len(layers)] = layers
        return cache.cache


def _selected(entry: Any, rows: Tensor) -> Any:
    new = copy.copy(entry)
    new.batch_select_indices(rows)
    return new


def _extended(entry: Any, keys: Tensor, values: Tensor) -> Any:
    new = copy.copy(entry)
    new.update(keys, values)
    return new


def _pretending(entry: Any, more: int, rows: int | None = None) -> Any:
    """An entry of the right length that holds nothing: of layers that are skipped nothing else is
    asked.
    """
    new = copy.copy(entry)
    batch, heads, columns, _ = entry.keys.shape
    size = (batch if rows is None else rows, heads, columns + more)
    new.keys = entry.keys[:1, :1, :1, :1].expand(*size, entry.keys.shape[3])
    new.values = entry.values[:1, :1, :1, :1].expand(*size, entry.values.shape[3])
    if hasattr(new, "cumulative_length"):  # a sliding window's
        new.cumulative_length = entry.cumulative_length + more
    return new
