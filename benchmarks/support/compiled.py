"""torch.compile (inductor) beside eager modules, dense and factored: `runtime.py --part compile`.

Of the first layers alone: every layer of a compressed model has shapes of its own, and compiling
all of them takes an hour on two cores.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from support.real_runtime import opened
from support.results import Comparison
from torch._inductor.exc import InvalidCxxCompiler

from tensorllm.runtime.measure import interleaved, medians


def first_layers(model: Any, count: int) -> Any:
    """The model without its other layers and its head."""
    model.model.layers = model.model.layers[:count]
    return model.model


@torch.inference_mode()
def compiled(args: Any, repeats: int) -> Iterator[dict[str, Any]]:
    """Every ratio and dtype: seconds of a prompt and of one token, as they are and compiled.

    Raises:
        SystemExit: there is no C++ compiler.
    """
    for ratio in args.ratios:
        for dtype in args.dtypes:
            where = {"dense": (args.model, "plain")}
            where["factored"] = (args.hybrid / f"{ratio:g}", "always")
            models = {n: first_layers(opened(*w, dtype), args.layers) for n, w in where.items()}
            row = {"ratio": ratio, "dtype": dtype, "layers": args.layers}
            yield row | {str(tokens): one(models, tokens, repeats) for tokens in (1, args.prompt)}


def one(models: dict[str, Any], tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds of so many tokens at once, without a cache, and of the first compiled call."""
    ids = torch.randint(0, 1000, (1, tokens), generator=torch.Generator().manual_seed(0))
    torch.compiler.reset()
    calls: dict[str, Callable[[], Any]] = {}
    first = {}
    for name, model in models.items():
        calls[name] = partial(model, ids, use_cache=False)
        made = calls[f"{name}, compiled"] = partial(
            torch.compile(model, dynamic=False), ids, use_cache=False
        )
        started = time.perf_counter()
        try:
            made()
        except InvalidCxxCompiler as error:
            raise SystemExit("torch.compile needs a C++ compiler; install g++") from error
        first[name] = time.perf_counter() - started
    seconds = medians(interleaved(calls, repeats if tokens > 1 else 10 * repeats))
    return {"seconds": seconds, "first_call_seconds": first}


def compared(rows: list[dict[str, Any]]) -> dict[str, Comparison]:
    """Compiled beside eager, and factored beside dense."""
    out = {}
    for row in rows:
        for tokens in (key for key in row if key.isdigit()):
            seconds = row[tokens]["seconds"]
            at = f"{tokens} tokens, ratio {row['ratio']:g}, {row['dtype']}"
            for ours, peer in (
                ("dense, compiled", "dense"),
                ("factored, compiled", "factored"),
                ("factored", "dense"),
                ("factored, compiled", "dense, compiled"),
            ):
                out[f"{ours} beside {peer}, {at}"] = Comparison(
                    ours=seconds[ours], peer=seconds[peer], peer_name=peer, unit="s"
                )
    return out
