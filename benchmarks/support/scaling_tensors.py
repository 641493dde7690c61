"""Parts of scaling.py without a model: decompositions, eigenvectors, the machine itself."""

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from support.counts import necessary_multiply_adds
from support.curves import Curve, seconds

from tensorllm.tensors.eigen import eigh
from tensorllm.tensors.tucker import tucker

K = 128  # head width of the decomposed layers
SHARES = {  # ranks as shares of (D, K, 4): those published for GPT-J, and inferred for LLaMA-2
    "strong": (304 / 4096, 19 / 256, 2 / 4),
    "mild": (1920 / 4096, 60 / 128, 3 / 4),
}


def machine(quick: bool) -> dict[str, Any]:
    """What this machine does at best, per second."""
    n = 256 if quick else 3072
    rates = {}
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        a = torch.randn(n, n, dtype=dtype)
        rates[f"multiply_adds_{name}"] = n**3 / seconds(lambda a=a: a @ a, 5)
    x = torch.randn(n * n * 7)
    rates["bytes_read"] = x.nbytes / seconds(lambda: x.sum(), 5)
    data = x.numpy().tobytes()
    rates["bytes_hashed"] = len(data) / seconds(lambda: hashlib.sha256(data).digest(), 3)
    return {"rates": rates}


def ranks_at(share: str, width: int, head: int, stack: int) -> tuple[int, int, int]:
    """The ranks that keep the same shares of other sizes."""
    sizes = (width, head, stack)
    r1, r2, r3 = (max(1, round(s * n)) for s, n in zip(SHARES[share], sizes, strict=True))
    return r1, r2, r3


def layer(width: int, heads: int, share: str) -> Callable[[], Any]:
    """One layer's decomposition with one sweep, as `compress` does it."""
    torch.manual_seed(0)
    head = min(K, width // 2)
    w = torch.randn(4, heads, head, width).permute(3, 2, 0, 1)  # as "heads" lies in memory
    ranks = dict(enumerate(ranks_at(share, width, head, 4)))
    return lambda: tucker(w, ranks)


def eigen(size: int, dtype: torch.dtype) -> Callable[[], Any]:
    x = torch.randn(size, size, dtype=dtype)
    gram = x @ x.mT
    return lambda: eigh(gram)


def decompose(quick: bool) -> dict[str, Any]:
    """Curves over width and heads, and how many necessary multiply-adds a second they come to."""
    wide, few = (1024, 1536, 2048, 3072, 4096), (64, 96, 128)
    curves = {
        f"one layer, {share} ranks, over width": Curve(
            over="model width D, D / 128 heads", xs=wide, quick=few, expected=3,
            prepare=lambda d, share=share: layer(d, max(1, d // K), share),
        )
        for share in SHARES
    } | {
        "one layer, strong ranks, over heads": Curve(
            over="heads H, width 2048", xs=(4, 8, 16, 32, 64), quick=(2, 4, 8), expected=1,
            prepare=lambda h: layer(128 if quick else 2048, h, "strong"),
        )
    }  # fmt: skip
    found = {name: curve.measure(quick) for name, curve in curves.items()}
    for share in SHARES:
        points = found[f"one layer, {share} ranks, over width"]["points"]
        width = round(points[-1][0])
        sizes = (width, min(K, width // 2), 4, max(1, width // K))
        needed = necessary_multiply_adds(sizes, ranks_at(share, *sizes[:3]), sweeps=1)
        found[f"one layer, {share} ranks, over width"]["necessary_multiply_adds"] = needed
    return found


def eigenvectors(quick: bool) -> dict[str, Any]:
    sizes, few = (512, 1024, 1536, 2048, 3072, 4096), (32, 64, 128)
    return {
        f"eigenvectors, {name}": Curve(
            over="order of the symmetric matrix", xs=sizes, quick=few, expected=3,
            prepare=partial(eigen, dtype=dtype), turns=2,
        ).measure(quick)
        for name, dtype in (("float32", torch.float32), ("float64", torch.float64))
    }  # fmt: skip
