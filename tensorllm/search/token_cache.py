"""What unedited layers make of generated tokens, kept by all that was read before and with each.

Trials answer much as the original and as each other do. Where they do, the layers below the lowest
edited one need not be run again: they saw the same tokens. That is exact, whatever is edited.

Shapes: B rows, G heads, K width of a head, D model width, R tokens that are kept.
"""

import copy
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tensorllm.evaluation.forward import Path
from tensorllm.search.activation_cache import ActivationCache

LEAST = 256  # tokens that room is made for at once
SHARE = 0.5  # of the memory at most: prompts are worth more


class TokenCache:
    """Tokens by their paths, with what enters each candidate layer and the keys and values below.

    Args:
        store: whose budget of memory this shares.
        candidates: layers that may be the lowest edited one.
    """

    def __init__(self, store: ActivationCache, candidates: Collection[int]) -> None:
        self.store = store
        self.candidates = frozenset(candidates)
        self.in_tuple = False  # whether layers return a tuple
        self.bytes = 0
        self.full = False  # whether there was no room once
        self._places: dict[Path, int] = {}
        self._depths: list[int] = []  # up to which candidate all is known
        self._hidden_RD: dict[int, Tensor] = {}
        self._below: list[tuple[Tensor, Tensor]] = []  # (R, G, K) each
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Tokens of which something is kept."""
        return len(self._depths)

    def index_of(self, path: Path | None, layer: int) -> int | None:
        """Where a token is kept, if it is known up to this layer."""
        at = None if path is None else self._places.get(path)
        return None if at is None or self._depths[at] < layer else at

    def hidden(self, layer: int, places_B: Tensor) -> Tensor:
        """What enters a layer, (B, 1, D); anything where nothing is kept that enters it."""
        kept_RD = self._hidden_RD.get(layer, next(iter(self._hidden_RD.values())))
        return kept_RD.index_select(0, places_B)[:, None]

    def add(
        self,
        paths: Sequence[Path],
        depth: int,
        hidden: Mapping[int, Tensor],
        layers: Sequence[Any],
    ) -> None:
        """Keep the last column of a pass.

        Args:
            paths: of its rows, all different.
            depth: the layer up to which nothing was edited.
            hidden: what entered the candidates up to it, (B, 1, D).
            layers: the cache's entries of the layers below it, `ORDINARY` ones.
        """
        with self._lock:
            new = [
                (row, path) for row, path in enumerate(paths) if self.index_of(path, depth) is None
            ]
            fresh = [path for _, path in new if path not in self._places]
            if not new or not self._room(len(self) + len(fresh), hidden, layers):
                return
            numbers = {path: len(self) + n for n, path in enumerate(fresh)}
            self._depths += [-1] * len(fresh)
            rows = [row for row, _ in new]
            places = [(self._places.get(path, numbers.get(path, 0)), path) for _, path in new]
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

    def _room(self, size: int, hidden: Mapping[int, Tensor], layers: Sequence[Any]) -> bool:
        """Whether there is room for so many tokens up to these layers, made where it may be."""
        for layer, hidden_B1D in hidden.items():
            shape = (hidden_B1D.shape[-1],)
            room = self._grown(self._hidden_RD.get(layer), size, shape, hidden_B1D)
            if room is None:
                return False
            self._hidden_RD[layer] = room
        for at, entry in enumerate(layers):
            old = self._below[at] if at < len(self._below) else (None, None)
            new = []
            for kept, tensor in zip(old, (entry.keys, entry.values), strict=True):
                room = self._grown(kept, size, (tensor.shape[1], tensor.shape[3]), tensor)
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
            self.full = True
            return None
        self.bytes += more
        new = like.new_empty(size, *shape)
        if old is not None:
            new[:have] = old
        return new

    def with_tokens(self, entry: Any, layer: int, places_BC: Tensor) -> Any:
        """A layer's entry of a cache with these tokens behind it."""
        new, places = copy.copy(entry), places_BC.flatten()
        read = (kept_RGK.index_select(0, places) for kept_RGK in self._below[layer])
        shape = places_BC.shape
        new.update(
            *(of_token.view(*shape, *of_token.shape[1:]).transpose(1, 2) for of_token in read)
        )
        return new
