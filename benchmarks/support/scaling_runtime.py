"""Part of scaling.py: one attention block of GPT-J's size, dense beside factored, over tokens.

What is counted: for a prefill every weight's multiply-add for each token, and scores and mixed
values of all pairs of tokens; for a step of decoding the bytes of the weights and of the cache,
each read once.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from support.attention_block import blocks, decode, prefill, weight_bytes_of
from support.curves import Curve

from tensorllm.runtime.measure import cache_bytes

WIDTH, HEADS, RANKS = 4096, 16, (304, 19, 2)
SMALL, SMALL_HEADS, SMALL_RANKS = 64, 2, (8, 4, 2)
BYTES = 4  # float32
SOME = 1024  # tokens that a cache is measured with, so that the room it grows into is little


class Block:
    """One side, and what it takes for some tokens."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.weights = weight_bytes_of(attention)
        _, kept = decode(attention, SOME)
        self.per_token = sum(cache_bytes(kept)) / SOME  # bytes of keys and values

    def prefill(self, tokens: int) -> Callable[[], Any]:
        return _without_gradients(prefill(self.attention, tokens))

    def decode(self, context: int) -> Callable[[], Any]:
        with torch.inference_mode():
            step, _ = decode(self.attention, context)
        many = 10  # a step alone is too short for the clock

        def run() -> None:
            for _ in range(many):
                step()

        return _without_gradients(run)

    def prefill_macs(self, tokens: int) -> float:
        return (self.weights * tokens + self.per_token * tokens**2) / BYTES

    def decode_bytes(self, context: int) -> float:
        return self.weights + self.per_token * context


@cache
def sides(quick: bool) -> dict[str, Block]:
    sizes = (SMALL, SMALL_HEADS, SMALL_RANKS) if quick else (WIDTH, HEADS, RANKS)
    with torch.inference_mode():
        dense, factored, _ = blocks(*sizes)
        return {"dense": Block(dense), "factored": Block(factored)}


def runtime(quick: bool) -> dict[str, Any]:
    """Prefill and ten steps of decoding, each of a dense and a factored block."""
    found = {}
    for name, block in sides(quick).items():
        found[f"prefill, {name}"] = Curve(
            over="tokens of the prompt", xs=(128, 256, 512, 1024, 2048), quick=(8, 16, 32),
            prepare=block.prefill, expected=block.prefill_macs,
        ).measure(quick)  # fmt: skip
        found[f"ten steps of decoding, {name}"] = Curve(
            over="tokens of context", xs=(128, 256, 512, 1024, 2000), quick=(8, 16, 32),
            prepare=block.decode, expected=block.decode_bytes, turns=5,
        ).measure(quick)  # fmt: skip
    return found


def _without_gradients(call: Callable[[], Any]) -> Callable[[], Any]:
    return torch.inference_mode()(call)
