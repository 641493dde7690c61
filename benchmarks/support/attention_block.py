"""One attention block of the GPT-J architecture, dense beside factored: used by `runtime.py`.

Weights are random: speed does not depend on them. Both sides run in turns in one process.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GPTJConfig, GPTJModel

from tensorllm.compressors import Site
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.runtime import install
from tensorllm.runtime.measure import cache_bytes, interleaved, medians
from tensorllm.tensors.factors import Tucker, parameters
from tensorllm.tensors.stacking import ATTENTION

WANTED = {  # ranks: prefill of 512 tokens, decoding behind 1024, both against dense
    (304, 19, 2): (4.0, 10.0),
    (1920, 120, 4): (1.3, 1.8),
}
SITE = Site((0,), ATTENTION, "heads")


def gptj(width: int, layers: int, heads: int, **more: Any) -> GPTJConfig:
    rotated = min(64, width // heads)
    tokens = {"bos_token_id": 0, "eos_token_id": 1}
    sizes = {"n_embd": width, "n_layer": layers, "n_head": heads}
    return GPTJConfig(**sizes, **tokens, rotary_dim=rotated, n_positions=2048, **more)


def blocks(width: int, heads: int, ranks: tuple[int, int, int]) -> tuple[Any, Any, Tucker]:
    """GPT-J's attention, dense and factored, with the same random weights."""
    noise = torch.Generator().manual_seed(0)
    config = gptj(width, 1, heads, vocab_size=8, n_inner=64)
    dense = GPTJModel(config).eval()
    sizes = zip((width, width // heads, 4), ranks, strict=True)
    core = torch.randn(*ranks, heads, generator=noise) / 64
    factors = {
        n: torch.linalg.qr(torch.randn(size, rank, generator=noise)).Q
        for n, (size, rank) in enumerate(sizes)
    }
    tucker = Tucker(core, factors)
    weights = parameters_of(dense)
    roles = RoleMatrices(config, weights)
    matrices = SITE.unstack(tucker.dense(), roles.spec.geometry(0))
    for (layer, role), w in zip(SITE.matrices, matrices, strict=True):
        roles.write(weights, layer, role, w)
    factored = GPTJModel(config).eval()
    install(factored, [(SITE, tucker)])
    return dense.h[0].attn, factored.h[0].attn, tucker


def prefill(attention: Any, tokens: int) -> Callable[[], Any]:
    noise = torch.Generator().manual_seed(1)
    x = torch.randn(1, tokens, attention.config.n_embd, generator=noise)
    mask = torch.full((tokens, tokens), torch.finfo(torch.float32).min).triu(1)[None, None]
    ids = torch.arange(tokens)[None]
    return lambda: attention(x, attention_mask=mask, position_ids=ids)[0]


def decode(attention: Any, context: int) -> tuple[Callable[[], Any], DynamicCache]:
    """One token behind `context` others; the cache is as long in every turn."""
    noise, width = torch.Generator().manual_seed(1), attention.config.n_embd
    cache = DynamicCache()
    xs = torch.randn(1, context, width, generator=noise)
    attention(xs, layer_past=cache, position_ids=torch.arange(context)[None])
    x, ids = torch.randn(1, 1, width, generator=noise), torch.tensor([[context]])
    mask = torch.zeros(1, 1, 1, context + 1)

    def run() -> Tensor:
        out: Tensor = attention(x, attention_mask=mask, layer_past=cache, position_ids=ids)[0]
        cache.crop(-1)
        return out

    return run, cache


@torch.inference_mode()
def block(
    ranks: tuple[int, int, int], repeats: int, width: int = 4096, heads: int = 16
) -> dict[str, Any]:
    """One attention block, by default of GPT-J's size."""
    dense, factored, tucker = blocks(width, heads, ranks)
    both = {"dense": dense, "factored": factored}
    calls = {name: prefill(module, 512) for name, module in both.items()}
    want = calls["dense"]()
    error = (want - calls["factored"]()).abs().max() / want.abs().max()
    at_once = timed(calls, repeats)
    steps = {name: decode(module, 1024) for name, module in both.items()}
    one = timed({name: run for name, (run, _) in steps.items()}, 10 * repeats)
    bytes_of = {name: weight_bytes_of(module) for name, module in both.items()}
    ratio = 4 * width**2 / parameters(tucker)
    caches = {name: cache_bytes(cache) for name, (_, cache) in steps.items()}
    wanted = WANTED.get(ranks, (None, None))
    return {
        "ranks": ranks,
        "largest_difference": error.item(),
        "threads": torch.get_num_threads(),
        "prefill_512": at_once | {"wanted": wanted[0]},
        "decode_1024": one | {"wanted": wanted[1]} | floor(bytes_of, caches, one),
        "weight_bytes": bytes_of,
        "compression_ratio": ratio,
        "bytes_ratio_over_compression_ratio": bytes_of["dense"] / bytes_of["factored"] / ratio,
        "key_and_value_bytes": caches,
        "value_bytes_ratio": caches["dense"][1] / caches["factored"][1],
        "head_dim_over_rank": width / heads / ranks[1],
    }


def floor(
    weights: dict[str, int], caches: dict[str, tuple[int, int]], measured: dict[str, Any]
) -> dict[str, Any]:
    """What a step cannot be below: every weight and the cache are read once from memory."""
    speed = read_speed()
    seconds = {name: (weights[name] + sum(caches[name])) / speed for name in weights}
    took = measured["seconds"]["quiet_median"]
    return {
        "floor_seconds": seconds,
        "read_bytes_per_second": speed,
        "times_the_floor": {name: took[name] / seconds[name] for name in seconds},
    }


def read_speed() -> float:
    """Bytes per second of a matrix times a vector that is far larger than every processor cache."""
    w, x = torch.randn(8192, 8192), torch.randn(8192)
    turns = interleaved({"read": lambda: torch.mv(w, x)}, 9)
    return w.nbytes / medians(turns)["read"]


def timed(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Any]:
    """Seconds and speed-ups: the median of turns that were not disturbed, of all, the fastest."""
    turns = interleaved(calls, repeats)
    found = {"quiet_median": medians(turns)}
    found["median"] = {n: statistics.median(t.seconds for t in v) for n, v in turns.items()}
    found["fastest"] = {n: min(t.seconds for t in v) for n, v in turns.items()}
    speedups = {kind: times["dense"] / times["factored"] for kind, times in found.items()}
    quiet = {n: f"{sum(t.quiet for t in v)} of {len(v)}" for n, v in turns.items()}
    return {"seconds": found, "speedup": speedups, "quiet_turns": quiet}


def weight_bytes_of(attention: nn.Module) -> int:
    """Bytes of the weights alone: both blocks have the same table of positions."""
    return sum({p.data_ptr(): p.nbytes for p in attention.parameters()}.values())
