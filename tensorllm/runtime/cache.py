"""A cache that grows in place: a step writes its own keys and values, and copies no others.

transformers' own layer copies all that is cached at every token, which costs as much as reading it.
Shapes: B batch, G key/value heads, N cached tokens, T new tokens, E and R key and value widths.
"""

from typing import Any

import torch
from torch import Tensor

ROOM = 64  # tokens that a layer has room for, at first and whenever it is full


def append(past: Any, k_BGTE: Tensor, v_BGTR: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Cache new keys and values; returns all of that layer's. Any kind of cache will do.

    Only transformers' plain growing layers are written in place, and only where nothing needs the
    copies: no gradients, no compiler, no moving of layers between devices.
    """
    layers = getattr(past, "layers", ())
    if layer < len(layers) and not getattr(past, "offloading", False):
        held = layers[layer]
        if is_plain(held) and _in_place(k_BGTE, held):
            return _grow(held, k_BGTE, v_BGTR)
    keys, values = past.update(k_BGTE, v_BGTR, layer)
    return keys, values


def is_plain(held: Any) -> bool:
    """Whether it is what transformers caches a layer with by default, and holds something."""
    from transformers.cache_utils import DynamicLayer

    return type(held) is DynamicLayer and held.is_initialized


def _in_place(new: Tensor, held: Any) -> bool:
    if torch.compiler.is_compiling() or new.requires_grad or held.keys.requires_grad:
        return False
    return not held.keys.is_inference() or torch.is_inference_mode_enabled()


def _grow(held: Any, k_BGTE: Tensor, v_BGTR: Tensor) -> tuple[Tensor, Tensor]:
    before = held.keys.shape[-2]
    after = before + k_BGTE.shape[-2]
    if not _fits(held, after):
        held.room = [_with_room(t, after + ROOM) for t in (held.keys, held.values)]
    for room, new in zip(held.room, (k_BGTE, v_BGTR), strict=True):
        room[..., before:after, :] = new
    held.keys, held.values = (room[..., :after, :] for room in held.room)
    return held.keys, held.values


def _fits(held: Any, length: int) -> bool:
    """Whether what is cached still begins where the room does: not once beams were reordered."""
    room = getattr(held, "room", None)
    return room is not None and all(
        r.data_ptr() == t.data_ptr() and r.shape[:2] == t.shape[:2] and r.shape[-2] >= length
        for r, t in zip(room, (held.keys, held.values), strict=True)
    )


def _with_room(t_BGNE: Tensor, length: int) -> Tensor:
    room = t_BGNE.new_empty(*t_BGNE.shape[:2], length, t_BGNE.shape[-1])
    room[..., : t_BGNE.shape[-2], :] = t_BGNE
    return room
