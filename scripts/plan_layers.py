"""What fitting 70 and 405 billion parameters takes, from one measured layer and its two lengths.

docs/results/scaling_fit.json has one layer of LLaMA-2-7B's size fitted to few tokens (part
`widths`, 4096) and to many (part `layer`). Two points give the cost per token and the cost that no
token changes (decompositions). The first grows with the layer's numbers, the second with the cube
of its width; nothing else is assumed about a processor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmark_tables import Lookup, amount, figure, span, table
from plan_machines import CORE_SHARE, CORES, EIGEN_SPEEDUP, ROOT

from tensorllm.tensors.stacking import Geometry

TOKENS = 128 * 2048  # calibrated on
FEW = 2  # cores; a server has EIGEN_SPEEDUP times their speed at eigenproblems
FILE = "scaling_fit"


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of a LLaMA, as its config.json has them."""

    name: str
    layers: int
    geometry: Geometry

    @property
    def numbers(self) -> int:
        """Of one layer's seven matrices."""
        return sum(map(self.geometry.numel, self.geometry.roles))


SMALL = Model("LLaMA-2-7B", 32, Geometry(D=4096, H=32, G=32, K=128, F=11_008, gated=True))
MODELS = (
    SMALL,
    Model("LLaMA-2-70B", 80, Geometry(D=8192, H=64, G=8, K=128, F=28_672, gated=True)),
    Model("Llama-3.1-405B", 126, Geometry(D=16_384, H=128, G=8, K=128, F=53_248, gated=True)),
)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one layer, in processor seconds, and in bytes.

    Attributes:
        fixed: what no token changes.
        per_token: what every token of the calibration text adds.
        forward: of one token in one forward pass.
        memory: at its peak, imports taken off.
    """

    fixed: float
    per_token: float
    forward: float
    memory: float

    def seconds(self, tokens: int) -> float:
        return self.fixed + tokens * self.per_token

    def of(self, model: Model, measured: Model = SMALL) -> "Cost":
        """The same of a layer of another model."""
        more = model.numbers / measured.numbers
        wider = model.geometry.D / measured.geometry.D
        return Cost(
            self.fixed * wider**3, self.per_token * more, self.forward * more, self.memory * more
        )


def measured(few: Mapping[str, Any], many: Mapping[str, Any]) -> Cost:
    """The line through two fits of one layer, to few tokens and to many."""
    span = many["tokens"] - few["tokens"]
    per_token = (many["fit_cpu_s"] - few["fit_cpu_s"]) / span
    return Cost(
        fixed=max(0.0, few["fit_cpu_s"] - few["tokens"] * per_token),
        per_token=per_token,
        forward=many["forward_cpu_s"] / many["tokens"],
        memory=many["peak_bytes"] - many["imports_bytes"],
    )


def server_seconds(cost: Cost, tokens: int) -> float:
    """On 64 cores, by the assumptions of the other tables."""
    return cost.fixed / (FEW * EIGEN_SPEEDUP) + tokens * cost.per_token / (CORES * CORE_SHARE)


def layers_table(value: Lookup) -> str:
    """A layer's cost and the whole model's, by model."""
    if not (ROOT / "docs" / "results" / f"{FILE}.json").is_file():
        return "Not measured yet: `python benchmarks/scaling_fit.py --parts widths layer`."
    layer = measured(value(f"{FILE}/widths/rows/4096"), value(f"{FILE}/layer"))
    rows = []
    for model in MODELS:
        cost = layer.of(model)
        one, passes = cost.seconds(TOKENS), 2 * TOKENS * cost.forward
        rows.append(
            (
                f"{model.name}, {model.layers} layers",
                amount(model.numbers / 1e6, "million"),
                span(one),
                f"{cost.fixed / one:.0%}",
                figure(one / passes),
                span(model.layers * one),
                span(model.layers * one / FEW),
                span(model.layers * server_seconds(cost, TOKENS)),
                amount(cost.memory, "bytes"),
            )
        )
    head = (
        *("model", "numbers of a layer", "core time of a layer", "of that without tokens"),
        *("times two forward passes", "core time", "2 cores", "64 cores", "memory"),
    )
    return table(head, rows)
