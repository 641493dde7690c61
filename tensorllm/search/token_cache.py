"""The unedited layers' activations of generated tokens, each kept under all tokens up to it.

Trials mostly generate the same answers as the original and as each other. Where they do, the layers
below the lowest edited one need not be run again: they saw the same tokens. That is exact, whatever
is edited.

Shapes: B rows, G key-value heads, K head_dim, D model width, R tokens kept.
"""

import copy
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tensorllm.evaluation.forward import Path
from tensorllm.search.activation_cache import ActivationCache

LEAST = 256  # tokens that room is first made for
SHARE = 0.5  # largest share of the memory budget: prompts are worth more


class TokenCache:
    """The input of each candidate layer, and the keys and values below, of tokens by their paths.

    A path is the sequence of tokens up to and including this one.

    Args:
        store: the activation cache whose memory budget this one shares.
        candidates: layers that may be the lowest edited one.
    """

    def __init__(self, store: ActivationCache, candidates: Collection[int]) -> None:
        self.store = store
        self.candidates = frozenset(candidates)
        self.in_tuple = False  # whether layers return a tuple
        self.bytes = 0
        self.full = False  # set once there was no room
        self._places: dict[Path, int] = {}
        self._depths: list[int] = []  # the highest candidate whose input is known, for each token
        self._hidden_RD: dict[int, Tensor] = {}
        self._below: list[tuple[Tensor, Tensor]] = []  # (R, G, K) each
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of tokens kept."""
        return len(self._depths)

    def index_of(self, path: Path | None, layer: int) -> int | None:
        """A token's position, if it is known up to this layer; else None."""
        at = None if path is None else self._places.get(path)
        return None if at is None or self._depths[at] < layer else at

    def hidden(self, layer: int, places_B: Tensor) -> Tensor:
        """The hidden states that enter a layer, (B, 1, D); arbitrary if none are kept for it."""
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
            depth: the layer up to which nothing is edited.
            hidden: the hidden states that entered the candidates up to `depth`, (B, 1, D).
            layers: the key-value cache entries of the layers below `depth`, of `ORDINARY` types.
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
            for at, path in places:  # last, since other threads may look at any time
                self._depths[at] = depth
                self._places[path] = at

    def _room(self, size: int, hidden: Mapping[int, Tensor], layers: Sequence[Any]) -> bool:
        """Make room for `size` tokens up to these layers; returns whether the budget allows it."""
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
        """A layer's key-value cache entry, extended by these tokens."""
        new, places = copy.copy(entry), places_BC.flatten()
        read = (kept_RGK.index_select(0, places) for kept_RGK in self._below[layer])
        shape = places_BC.shape
        new.update(
            *(of_token.view(*shape, *of_token.shape[1:]).transpose(1, 2) for of_token in read)
        )
        return new
