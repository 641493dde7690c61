"""A cache that grows in place: a step writes its own keys and values, and copies no others.

transformers' own layer copies all that is cached at every token, into memory that is new each time.
Shapes: B batch, G key/value heads, N cached tokens, T new tokens, E and R key and value widths.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

ROOM = 64  # tokens that a layer has room for at most, at first and whenever it is full


@dataclass(slots=True, eq=False)
class Room:
    """Memory for more tokens than are cached.

    Attributes:
        keys, values: (B, G, N, E) and (B, G, N, R), N what there is room for.
        used: tokens written so far. Memory behind them is free; those before may belong to
            another cache too: a copy of one that was cut back shares them.
    """

    keys: Tensor
    values: Tensor
    used: int

    def takes(self, layer: Any, after: int) -> bool:
        """Whether a layer's tokens lie here, at the beginning, and are the last ones that do.

        They do not once beams were reordered, or rows chosen.
        """
        return (
            self.keys.data_ptr() == layer.keys.data_ptr()
            and self.values.data_ptr() == layer.values.data_ptr()
            and self.keys.shape[:2] == layer.keys.shape[:2]
            and self.used == layer.keys.shape[-2]
            and after <= self.keys.shape[-2]
        )


class GrowingLayer(DynamicLayer):
    """transformers' growing layer, with free memory behind what is cached."""

    keys: Any
    values: Any
    room: Room | None = None

    @classmethod
    def of(cls, layer: DynamicLayer) -> "GrowingLayer":
        made = cls()
        made.__dict__.update(layer.__dict__)
        return made

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """All keys (B, G, N, E) and values (B, G, N, R) with the new ones."""
        if not self._in_place(key_states):
            return super().update(key_states, value_states, *args, **kwargs)
        before = self.keys.shape[-2]
        after = before + key_states.shape[-2]
        room = self.room
        if room is None or not room.takes(self, after):
            length = after + min(ROOM, 1 + after // 4)
            keys, values = (_with_room(t, length) for t in (self.keys, self.values))
            room = self.room = Room(keys, values, 0)
        room.keys[..., before:after, :] = key_states
        room.values[..., before:after, :] = value_states
        room.used = after
        self.keys, self.values = room.keys[..., :after, :], room.values[..., :after, :]
        return self.keys, self.values

    def _in_place(self, new: Tensor) -> bool:
        """Only where nothing needs the copies: no gradients, no compiler."""
        if not self.is_initialized or torch.compiler.is_compiling():
            return False
        if new.requires_grad or self.keys.requires_grad or not self.keys.numel():
            return False
        return not self.keys.is_inference() or torch.is_inference_mode_enabled()


def grow_in_place(model: nn.Module) -> None:
    """Let every plain cache that the model is given grow in place, from its second use on."""
    model.register_forward_pre_hook(_growing, with_kwargs=True)


def _growing(module: nn.Module, rest: tuple[Any, ...], given: dict[str, Any]) -> None:
    del module, rest
    past = given.get("past_key_values")
    past = getattr(past, "self_attention_cache", past)
    if past is None or torch.compiler.is_compiling() or getattr(past, "offloading", False):
        return  # or layers are moved between devices
    layers: Any = getattr(past, "layers", ())
    for number, held in enumerate(layers):
        if type(held) is DynamicLayer and held.is_initialized:
            layers[number] = GrowingLayer.of(held)


def is_plain(held: Any) -> bool:
    """Whether it is what transformers caches a layer with by default, and holds something."""
    return type(held) in (DynamicLayer, GrowingLayer) and held.is_initialized


def _with_room(t_BGNE: Tensor, length: int) -> Tensor:
    room = t_BGNE.new_empty(*t_BGNE.shape[:2], length, t_BGNE.shape[-1])
    room[..., : t_BGNE.shape[-2], :] = t_BGNE
    return room
