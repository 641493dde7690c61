"""Speed and bytes of factored layers, beside dense ones in the same run.

    python benchmarks/runtime.py                 # both parts, docs/results/runtime.json
    python benchmarks/runtime.py --part block    # one attention block of GPT-J's size

Times are medians of turns taken one after the other, so that ratios hold on a busy machine. Weights
are random: speed does not depend on them.
"""

import argparse
import copy
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GPTJConfig, GPTJForCausalLM, GPTJModel

import tensorllm as tl
from tensorllm.architectures import RoleMatrices, parameters_of
from tensorllm.compressors import Site
from tensorllm.environment import environment
from tensorllm.pipeline.bench import BenchRequest, bench
from tensorllm.pipeline.measure import cache_bytes, interleaved, measure, medians
from tensorllm.runtime import install
from tensorllm.runtime.cost import dense_cost, factored_cost
from tensorllm.tensors.factors import Tucker, parameters
from tensorllm.tensors.stacking import ATTENTION

ROOT = Path(__file__).parents[1]
WANTED = {  # ranks: prefill of 512 tokens, decoding behind 1024, both against dense
    (304, 19, 2): (4.0, 10.0),
    (1920, 120, 4): (1.3, 1.8),
}
SITE = Site((0,), ATTENTION, "heads")


def gptj(width: int, layers: int, heads: int, **more: Any) -> GPTJConfig:
    return GPTJConfig(
        n_embd=width, n_layer=layers, n_head=heads, rotary_dim=64, n_positions=2048, **more
    )


def orthonormal(rows: int, columns: int, noise: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=noise)).Q


def blocks(ranks: tuple[int, int, int]) -> tuple[Any, Any, Tucker]:
    """GPT-J's attention, dense and factored, with the same random weights."""
    noise = torch.Generator().manual_seed(0)
    config = gptj(4096, 1, 16, vocab_size=8, n_inner=64)
    dense = GPTJModel(config).eval()
    sizes = (4096, 256, 4)
    core = torch.randn(*ranks, 16, generator=noise) / 64
    factors = {
        n: orthonormal(s, r, noise) for n, (s, r) in enumerate(zip(sizes, ranks, strict=True))
    }
    tucker = Tucker(core, factors)
    weights = parameters_of(dense)
    roles = RoleMatrices(config, weights)
    for (layer, role), w in zip(
        SITE.matrices, SITE.unstack(tucker.dense(), roles.geometry), strict=True
    ):
        roles.write(weights, layer, role, w)
    factored = GPTJModel(config).eval()
    install(factored, [(SITE, tucker)])
    return dense.h[0].attn, factored.h[0].attn, tucker


def prefill(attention: nn.Module, tokens: int) -> Callable[[], Any]:
    x = torch.randn(1, tokens, 4096, generator=torch.Generator().manual_seed(1))
    mask = torch.full((tokens, tokens), torch.finfo(torch.float32).min).triu(1)[None, None]
    ids = torch.arange(tokens)[None]
    return lambda: attention(x, attention_mask=mask, position_ids=ids)[0]


def decode(attention: nn.Module, context: int) -> tuple[Callable[[], Any], DynamicCache]:
    """One token behind `context` others; the cache is as long in every turn."""
    noise = torch.Generator().manual_seed(1)
    cache = DynamicCache()
    xs = torch.randn(1, context, 4096, generator=noise)
    attention(xs, layer_past=cache, position_ids=torch.arange(context)[None])
    x, ids = torch.randn(1, 1, 4096, generator=noise), torch.tensor([[context]])
    mask = torch.zeros(1, 1, 1, context + 1)

    def run() -> Tensor:
        out: Tensor = attention(x, attention_mask=mask, layer_past=cache, position_ids=ids)[0]
        cache.crop(-1)
        return out

    return run, cache


@torch.inference_mode()
def block(ranks: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """One attention block, dense beside factored."""
    dense, factored, tucker = blocks(ranks)
    both = {"dense": dense, "factored": factored}
    calls = {name: prefill(module, 512) for name, module in both.items()}
    error = (calls["dense"]() - calls["factored"]()).abs().max() / calls["dense"]().abs().max()
    at_once = timed(calls, repeats)
    steps = {name: decode(module, 1024) for name, module in both.items()}
    one = timed({name: run for name, (run, _) in steps.items()}, 4 * repeats)
    bytes_of = {name: weight_bytes_of(module) for name, module in both.items()}
    ratio = 4 * 4096 * 4096 / parameters(tucker)
    caches = {name: cache_bytes(cache) for name, (_, cache) in steps.items()}
    geometry = RoleMatrices(dense.config, ["h.0.attn.q_proj.weight"]).geometry
    cost = dense_cost(SITE, geometry), factored_cost(SITE, tucker, geometry)
    return {
        "ranks": ranks,
        "largest_difference": error.item(),
        "threads": torch.get_num_threads(),
        "prefill_512": at_once | {"wanted": WANTED[ranks][0]},
        "decode_1024": one | {"wanted": WANTED[ranks][1]},
        "products_ratio_of_the_cost_model": cost[0].products / cost[1].products,
        "reads_ratio_of_the_cost_model": cost[0].reads / cost[1].reads,
        "weight_bytes": bytes_of,
        "compression_ratio": ratio,
        "bytes_ratio_over_compression_ratio": bytes_of["dense"] / bytes_of["factored"] / ratio,
        "key_and_value_bytes": caches,
        "value_bytes_ratio": caches["dense"][1] / caches["factored"][1],
        "head_dim_over_rank": 256 / ranks[1],
    }


def timed(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Any]:
    """Seconds and speed-ups: the median turn, and the fastest, which other work disturbs least."""
    seconds = interleaved(calls, repeats)
    found = {"median": medians(seconds), "fastest": {n: min(v) for n, v in seconds.items()}}
    speedups = {kind: times["dense"] / times["factored"] for kind, times in found.items()}
    return {"seconds": found, "speedup": speedups}


def weight_bytes_of(attention: nn.Module) -> int:
    """Bytes of the weights alone: both blocks have the same table of positions."""
    return sum({p.data_ptr(): p.nbytes for p in attention.parameters()}.values())


def whole(repeats: int) -> dict[str, Any]:
    """A 12-layer model, from its folder: end to end, dense beside factored."""
    torch.manual_seed(0)
    model = GPTJForCausalLM(gptj(1024, 12, 16)).eval()
    ranks = (256, 16, 4)
    with tempfile.TemporaryDirectory() as folder:
        tl.compress(model, tl.SharedTucker4D(ranks=ranks, sweeps=0))
        tl.save(model, Path(folder) / "out")
        found = bench(
            BenchRequest(
                model=Path(folder) / "out", prompt_tokens=512, new_tokens=32, repeats=repeats
            )
        )
    out = {"ranks": ranks, **found.to_json()}
    out.pop("environment")
    out.pop("sites")
    return out | {"beside_tltorch": beside_tltorch(model, repeats)}


def beside_tltorch(model: Any, repeats: int) -> dict[str, Any] | str:
    """Ours beside tltorch's factorised linears in all attention, with as many parameters."""
    try:
        import tltorch
    except ImportError:
        return "not installed (pip install tensorly-torch)"
    theirs = copy.deepcopy(model)
    tl.factorize(model)
    ours = sum(p.numel() for layer in model.transformer.h for p in layer.attn.parameters())
    each = ours / (4 * len(model.transformer.h))
    for layer in theirs.transformer.h:
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear = tltorch.FactorizedLinear(
                (32, 32), (32, 32), bias=False, factorization="tucker", rank=each / 1024**2
            )
            setattr(layer.attn, name, linear.eval())
    found = measure({"tltorch": theirs, "factored": model}, 512, 32, repeats)
    parameters_of_theirs = sum(
        p.numel() for layer in theirs.transformer.h for p in layer.attn.parameters()
    )
    return {
        "attention_parameters": {"tltorch": parameters_of_theirs, "factored": ours},
        "models": {name: measured.to_json() for name, measured in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("block", "whole", "all"), default="all")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--note", default="", help="kept with the figures, such as how busy it was")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "runtime.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {}
    about = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(),
        "threads": args.threads,
        "note": args.note,
    }
    if args.part in ("block", "all"):
        rows = [block(ranks, args.repeats) for ranks in WANTED]
        found[f"block, {args.threads} threads"] = about | {"load": os.getloadavg(), "rows": rows}
    if args.part in ("whole", "all"):
        row = whole(max(3, args.repeats // 3))
        found["whole"] = about | {"load": os.getloadavg(), **row}
    print(f"{time.perf_counter() - started:.0f} s")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(args.out.read_text())


if __name__ == "__main__":
    main()
