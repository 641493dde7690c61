"""Grouped-query attention for one new token in 16 bits on a CPU, with one product per group.

Without a mask, transformers lets torch's kernel repeat the keys and values of a group; with one,
the queries of a group are rows of one product. So attention is given a mask that hides nothing, on
machines that emulate products of 16 bits; with instructions for them, repeating is faster.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tensorllm.runtime.attention import FactoredAttention
from tensorllm.runtime.cache import is_plain
from tensorllm.runtime.products import OWN_INSTRUCTIONS, speed_of


def pack_groups(module: Any) -> None:
    """Enable this for an attention module of transformers whose queries share keys."""
    if isinstance(module, FactoredAttention):
        return  # it has its own attention
    own = vars(module)  # most modules have neither, and then `getattr` takes microseconds
    if own.get("num_key_value_groups", 1) > 1 and "layer_idx" in own:
        module.register_forward_pre_hook(_with_mask, with_kwargs=True)


def _with_mask(module: Any, rest: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, Any] | None:
    x_BTD = given.get("hidden_states")
    if (
        not isinstance(x_BTD, Tensor)
        or x_BTD.shape[1] != 1
        or x_BTD.device.type != "cpu"
        or x_BTD.dtype not in (torch.bfloat16, torch.float16)
        or speed_of(x_BTD.dtype) > OWN_INSTRUCTIONS
        or given.get("attention_mask", x_BTD) is not None
        or torch.compiler.is_compiling()
    ):
        return None
    layers, number = getattr(given.get("past_key_values"), "layers", ()), module.layer_idx
    if module.config._attn_implementation != "sdpa" or number >= len(layers):
        return None
    held = layers[number]
    if not is_plain(held):
        return None
    return rest, {**given, "attention_mask": _all(held.keys.shape[-2] + 1)}


@lru_cache(maxsize=4)
def _all(tokens: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones(1, 1, 1, tokens, dtype=torch.bool)
