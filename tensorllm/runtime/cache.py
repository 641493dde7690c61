"""A key-value cache that grows in place, so that a step copies only its own keys and values.

transformers' own layer copies the whole cache into newly allocated memory at every token.

Shapes: B batch, G key/value heads, N cached tokens, T new tokens, E and R key and value widths.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

ROOM = 64  # most tokens for which memory is allocated in advance


@dataclass(slots=True, eq=False)
class Room:
    """Memory for more tokens than are cached.

    Attributes:
        keys, values: (B, G, N, E) and (B, G, N, R), N the capacity.
        used: tokens written so far. Memory after them is free; memory before may be shared with
            another cache, such as a copy that was cropped.
    """

    keys: Tensor
    values: Tensor
    used: int

    def takes(self, layer: Any, after: int) -> bool:
        """Whether a layer's tokens fill this memory so far, and `after` tokens fit into it.

        They do not fill it after beams were reordered or rows selected.
        """
        return (
            self.keys.data_ptr() == layer.keys.data_ptr()
            and self.values.data_ptr() == layer.values.data_ptr()
            and self.keys.shape[:2] == layer.keys.shape[:2]
            and self.used == layer.keys.shape[-2]
            and after <= self.keys.shape[-2]
        )


class GrowingLayer(DynamicLayer):
    """transformers' growing layer, with free memory after the cached tokens."""

    keys: Any
    values: Any
    room: Room | None = None

    @classmethod
    def of(cls, layer: DynamicLayer) -> "GrowingLayer":
        made = cls()
        made.__dict__.update(layer.__dict__)
        return made

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """All keys (B, G, N, E) and values (B, G, N, R), including the new ones."""
        if not self._in_place(key_states):
            return super().update(key_states, value_states, *args, **kwargs)
        before = self.keys.shape[-2]
        after = before + key_states.shape[-2]
        room = self.room
        if room is None or not room.takes(self, after):
            length = after + min(ROOM, 1 + after // 4)
            # One after the other: where the old keys were, there is memory for the values.
            self.keys = _with_room(self.keys, length)
            self.values = _with_room(self.values, length)
            room = self.room = Room(self.keys, self.values, 0)
        room.keys[..., before:after, :] = key_states
        room.values[..., before:after, :] = value_states
        room.used = after
        self.keys, self.values = room.keys[..., :after, :], room.values[..., :after, :]
        return self.keys, self.values

    def _in_place(self, new: Tensor) -> bool:
        """Whether writing in place is safe: no gradients, no compiler."""
        if not self.is_initialized or torch.compiler.is_compiling():
            return False
        if new.requires_grad or self.keys.requires_grad or not self.keys.numel():
            return False
        return not self.keys.is_inference() or torch.is_inference_mode_enabled()


def grow_in_place(model: nn.Module) -> None:
    """Let every plain cache passed to the model grow in place, from its second use on."""
    model.register_forward_pre_hook(_growing, with_kwargs=True)


def _growing(module: nn.Module, rest: tuple[Any, ...], given: dict[str, Any]) -> None:
    del module, rest
    past = given.get("past_key_values")
    past = getattr(past, "self_attention_cache", past)
    if past is None or torch.compiler.is_compiling() or getattr(past, "offloading", False):
        return  # offloading moves layers between devices
    layers: Any = getattr(past, "layers", ())
    for number, held in enumerate(layers):
        if type(held) is DynamicLayer and held.is_initialized:
            layers[number] = GrowingLayer.of(held)


def is_plain(held: Any) -> bool:
    """Whether this is transformers' default cache of a layer, and not empty."""
    return type(held) in (DynamicLayer, GrowingLayer) and held.is_initialized


def _with_room(t_BGNE: Tensor, length: int) -> Tensor:
    room = t_BGNE.new_empty(*t_BGNE.shape[:2], length, t_BGNE.shape[-1])
    room[..., : t_BGNE.shape[-2], :] = t_BGNE
    return room
