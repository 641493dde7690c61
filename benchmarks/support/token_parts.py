"""Where the time of one decoded token goes, dense and factored: used by `runtime.py --part token`.

Processor time, the lower quartile of some tokens. Time outside the linears is measured by letting
them return constants; time of products, by running these alone, one after another in the model's
order, with the output head in between so that no cache holds their weights.
Shapes: D model width, I inputs and O outputs of a product.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from support.real_runtime import opened, read_bytes
from torch import Tensor, nn

from tensorllm.runtime.install import FactoredLinear
from tensorllm.runtime.low_rank import PivotedSite
from tensorllm.runtime.products import setting, times
from tensorllm.runtime.sites import RoleLinear

PARTS = ("whole", "not the linears", "linears", "products alone", "operations around them", "head")


def token_parts(args: Any, tokens: int) -> Iterator[dict[str, Any]]:
    """Milliseconds of each part, a row for every ratio, dtype, and side."""
    for dtype in args.dtypes:
        dense = parts(opened(args.model, "plain", dtype), args.prompt, tokens)
        for ratio in args.ratios:
            folder = args.hybrid / f"{ratio:g}"
            small = parts(opened(folder, "always", dtype), args.prompt, tokens)
            for name, found in (("dense", dense), ("factored", small)):
                yield {"ratio": ratio, "dtype": dtype, "what": name, **found}


@torch.inference_mode()
def parts(model: Any, prompt: int, tokens: int) -> dict[str, Any]:
    """Milliseconds of each of `PARTS`, and the bytes that a token reads."""
    ids = torch.randint(0, model.config.vocab_size, (1, prompt + 1 + 2 * tokens))
    cache = model(ids[:, :prompt], use_cache=True, logits_to_keep=1).past_key_values
    numbers = iter(range(prompt, prompt + 1 + 2 * tokens))

    def token() -> None:
        i = next(numbers)
        model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)

    seen = seen_by_linears(model, token)
    whole = quartile(token, tokens)
    made = [product for linear, (x, _) in seen.items() for product in products(linear, x)]
    head = model.get_output_embeddings()
    x_D = torch.zeros(1, 1, head.weight.shape[1], dtype=head.weight.dtype)

    def alone() -> None:
        for product in made:
            product()

    products_alone = quartile(alone, tokens, lambda: head(x_D))
    of_head = quartile(lambda: head(x_D), tokens, alone)
    for linear, (_, y) in seen.items():
        linear.forward = lambda x, y=y: y
    rest = quartile(token, tokens)
    seconds = (whole, rest, whole - rest, products_alone, whole - rest - products_alone, of_head)
    milliseconds = {name: 1000 * each for name, each in zip(PARTS, seconds, strict=True)}
    return {"ms": milliseconds, "bytes_per_token": read_bytes(model), "products": len(made)}


def quartile(call: Callable[[], Any], times: int, before: Callable[[], Any] | None = None) -> float:
    """Processor seconds of a call that a quarter of the calls took less than."""
    seconds = []
    for _ in range(times):
        if before is not None:
            before()
        started = time.thread_time()
        call()
        seconds.append(time.thread_time() - started)
    return sorted(seconds)[times // 4]


def linears(model: nn.Module) -> list[Any]:
    """Of the layers: all linears, in whatever form, in the model's order."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    inside = {
        id(below)
        for module in model.modules()
        if isinstance(module, FactoredLinear)
        for below in module.modules()
        if below is not module
    }
    kinds = FactoredLinear | nn.Linear
    return [
        m for m in model.modules() if isinstance(m, kinds) and m is not head and id(m) not in inside
    ]


def seen_by_linears(model: Any, run: Callable[[], None]) -> dict[Any, tuple[Tensor, Tensor]]:
    """What each linear of `linears` is given and gives while something runs."""
    seen: dict[Any, tuple[Tensor, Tensor]] = {}

    def see(linear: Any, given: tuple[Tensor], y: Tensor) -> None:
        seen[linear] = (given[0].clone(), y.clone())

    hooks = [linear.register_forward_hook(see) for linear in linears(model)]
    run()
    for hook in hooks:
        hook.remove()
    return seen


def products(linear: Any, x: Tensor) -> list[Callable[[], Any]]:
    """The products with the weights of a linear and nothing else; of a site's roles, for one."""
    if isinstance(linear, FactoredLinear):
        (part,) = linear.parts.values()
        site = part._site[0] if isinstance(part, RoleLinear) else None
        if isinstance(site, PivotedSite):
            weights = [] if part.index else [site.basis.weight, site.mix.weight]
            return [partial(times(w, setting(x)), row(w)) for w in weights if w.numel()]
    return [partial(linear, x)]


def row(w_IO: Tensor) -> Tensor:
    """(1, I) of any numbers."""
    return torch.randn(1, w_IO.shape[0]).to(w_IO.dtype)
