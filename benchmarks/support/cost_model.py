"""The cost model of `--policy auto` beside measured times: used by `runtime.py`.

Sites from far below to above the point where factors stop to gain, in layers of several widths.
"""

from typing import Any

import torch
from support.attention_block import SITE, blocks, decode, prefill
from torch import nn

from tensorllm.compressors import Site
from tensorllm.models import RoleMatrices
from tensorllm.runtime import SiteModule, module_for
from tensorllm.runtime.cost import Choice, Cost, costs_of
from tensorllm.runtime.measure import interleaved, medians
from tensorllm.tensors.factors import LowRank
from tensorllm.tensors.stacking import Geometry

ATTENTION_SITES = [  # width, heads, ranks
    (4096, 16, (304, 19, 2)),
    (4096, 16, (1920, 120, 4)),
    (4096, 16, (2816, 176, 4)),
    (1024, 16, (256, 16, 4)),
    (1024, 16, (640, 40, 4)),
    (1024, 16, (768, 56, 4)),
    (256, 4, (64, 16, 2)),
    (256, 4, (128, 32, 4)),
    (128, 4, (32, 8, 2)),
    (64, 4, (32, 8, 4)),
]
LOW_RANKS = [(4096, 512), (4096, 2048), (1024, 128), (1024, 512), (256, 64), (64, 8)]
TOKENS = 512
KINDS = ("prefill", "decode")


@torch.inference_mode()
def costs(repeats: int, widest: int = 4096) -> list[dict[str, Any]]:
    """Predicted and measured speed-ups of a prompt and of one token, site by site."""
    rows = []
    for width, heads, ranks in (site for site in ATTENTION_SITES if site[0] <= widest):
        dense, factored, tucker = blocks(width, heads, ranks)
        both = {"dense": dense, "factored": factored}
        geometry = RoleMatrices(dense.config, ["h.0.attn.q_proj.weight"]).spec.geometry(0)
        calls = (
            {name: prefill(module, TOKENS) for name, module in both.items()},
            {name: decode(module, 64)[0] for name, module in both.items()},
        )
        cost = costs_of(SITE, tucker, geometry)
        rows.append({"site": "qkvo", "width": width, "ranks": ranks} | row(*cost, *calls, repeats))
    for width, rank in (site for site in LOW_RANKS if site[0] <= widest):
        rows.append(
            {"site": "in", "width": width, "ranks": [rank]} | low_rank(width, rank, repeats)
        )
    return rows


def low_rank(width: int, rank: int, repeats: int) -> dict[str, Any]:
    """An FFN matrix four times as wide as the model."""
    factors = LowRank(torch.randn(4 * width, rank), torch.randn(rank, width))
    geometry = Geometry(D=width, H=4, G=4, K=width // 4, F=4 * width, gated=False)
    site = Site((0,), ("in",), "matrix")
    cost = costs_of(site, factors, geometry)
    both = {
        "dense": nn.Linear(width, 4 * width, bias=False),
        "factored": module_for(site, factors).roles(site, factors, geometry)[0, "in"].module,
    }
    calls = [
        {name: lambda m=module, x=x: m(x) for name, module in both.items()}
        for x in (torch.randn(1, TOKENS, width), torch.randn(1, 1, width))
    ]
    return row(*cost, *calls, repeats)


def row(dense: Cost, small: Cost, prompt: Any, step: Any, repeats: int) -> dict[str, Any]:
    many = 20 * repeats
    found = [medians(interleaved(calls, n)) for calls, n in ((prompt, repeats), (step, many))]
    predicted = Choice("", True, "", dense, small).speedups
    out: dict[str, Any] = {"seconds": dict(zip(KINDS, found, strict=True))}
    for name, seconds, ratio in zip(KINDS, found, predicted, strict=True):
        out[name] = {"predicted": ratio, "measured": seconds["dense"] / seconds["factored"]}
    return out


def least_gain(rows: list[dict[str, Any]]) -> float | None:
    """The smallest speed-up that was measured of the sites that `--policy auto` runs factored."""
    chosen = [r for r in rows if min(r[kind]["predicted"] for kind in KINDS) >= SiteModule.margin]
    return min((r[kind]["measured"] for r in chosen for kind in KINDS), default=None)
