"""A plan on paper for a model of 405 billion parameters: times, memory and disk of every task.

Computed from docs/results/scaling.json, the code's own formulas and the assumptions that
docs/scaling.md shows; scripts/fill_numbers.py puts the tables there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

from benchmark_tables import Lookup, amount, figure, span, table
from plan_layers import layers_table
from plan_machines import ORDER, Machine, assumptions, machines, measured_layers, scaling
from support.scaling_tensors import ranks_at  # plan_machines says where that lies

from tensorllm.checkpoint.writer import SHARD_BYTES
from tensorllm.compression.dry_run import BASE_BYTES, WORKING_COPIES
from tensorllm.compressors import ActivationHybrid, Site
from tensorllm.compressors.calibrated.activation import partitions
from tensorllm.tensors.ranks import tucker_parameters
from tensorllm.tensors.shared_input import reading_together
from tensorllm.tensors.stacking import ATTENTION, Geometry

# Llama-3.1-405B, as its config.json has it; weights in bfloat16
LAYERS, VOCABULARY, BYTES = 126, 128_256, 2
GEOMETRY = Geometry(D=16_384, H=128, G=8, K=128, F=53_248, gated=True)
WIDTH, HEAD, MATRICES, GROUPS = Site((0,), ATTENTION, "heads").shape(GEOMETRY)
STACK = (WIDTH, HEAD, MATRICES, GROUPS)
LAYER = prod(STACK) + 3 * GEOMETRY.D * GEOMETRY.F
EMBEDDING = VOCABULARY * GEOMETRY.D
PARAMETERS = LAYERS * (LAYER + 2 * GEOMETRY.D) + 2 * EMBEDDING + GEOMETRY.D
SIZE = float(BYTES * PARAMETERS)

TOKENS = 10 * GEOMETRY.F  # calibrated on: ten for every input of the widest matrix
SAMPLE = 0.5  # of the text sizes are chosen by, and of that half gradients are taken on
QUESTIONS, PROMPT, VALIDATION = 10_000, 100, 0.2  # asked, tokens of each, share that is searched on
TRIALS, EDITED = 100, 16  # of a search over so many last layers
COPIES = 3  # of a covariance, and of a matrix in float32, that a fit holds while it decomposes

CLUSTERS = reading_together([role for role in GEOMETRY.roles if role in ActivationHybrid.roles])
OUTPUTS = [sum(map(GEOMETRY.outputs, cluster)) for cluster in CLUSTERS]


@dataclass(frozen=True)
class Task:
    """What a task takes.

    Attributes:
        steps: seconds by step on a machine; nothing overlaps.
        memory: bytes at its peak.
        disk: bytes written.
    """

    name: str
    steps: Callable[[Machine], dict[str, float]]
    memory: float
    disk: float


def compress(machine: Machine, share: str) -> dict[str, float]:
    """Shared Tucker on all layers, streamed from folder to folder.

    One thread hashes beside all else: it takes its share of the processors, or what it is longer.
    """
    products, eigenvectors = machine.decompose(STACK, share)
    steps = {
        "read": SIZE / machine.read,
        "products": LAYERS * products,
        "eigenvectors": LAYERS * eigenvectors,
        "write": SIZE / machine.write,
    }
    hashing = SIZE / machine.hashed
    return {**steps, "hash": max(hashing / machine.cores, hashing - sum(steps.values()))}


def fit(machine: Machine) -> dict[str, float]:
    """activation-hybrid from disk, layer by layer, in two sweeps, without refit.

    Passes through a layer: half of the text to measure, of that half backwards too; then the
    original once, and the compressed layer's attention and FFN twice each. Covariances, all of them
    of the model's width: inputs and outputs on half of the text, gradients on a quarter, and both
    models' together on all of it.
    """
    square, reads = float(GEOMETRY.D**2), [len(c) for c in CLUSTERS if len(c) > 1]
    propagated = sum(n**2 for n in reads) + 2
    covariances = len(CLUSTERS) * (SAMPLE + 2) + SAMPLE**2 * propagated
    candidates, chosen = _decompositions()
    reading = sum(OUTPUTS[i] * GEOMETRY.D for i, c in enumerate(CLUSTERS) if len(c) > 1)
    return {
        "read": 2 * SIZE / machine.read,
        "passes": machine.passes(LAYERS * (SAMPLE + SAMPLE**2 + 3) * TOKENS * LAYER),
        "gradients propagated": machine.products(LAYERS * SAMPLE**2 * TOKENS * reading, "float32"),
        "covariances": machine.products(LAYERS * TOKENS * covariances * square, "float32"),
        "adding up": LAYERS * (TOKENS / GEOMETRY.D) * 12 * covariances * square / machine.moved,
        "products": LAYERS * (2 * candidates + 6 * chosen) * square * GEOMETRY.D
        / machine.macs["float64"],
        "eigenvectors": LAYERS * machine.eigen([GEOMETRY.D] * (candidates + chosen)),
    }  # fmt: skip


def _decompositions() -> tuple[int, int]:
    """Eigenproblems of the width in one layer: of its candidates, and at most of its factors."""
    groups = [{g for way in partitions(c, True) for g in way} for c in CLUSTERS]
    return sum(map(len, groups)), sum(map(len, CLUSTERS))


def evaluate(machine: Machine) -> dict[str, float]:
    passes = machine.passes(float(QUESTIONS * PROMPT) * (PARAMETERS - EMBEDDING))
    return {"read": SIZE / machine.read, "passes": passes}


def search(machine: Machine) -> dict[str, float]:
    """One pass below the edited layers; then each trial from its layer up, on average half."""
    tokens = VALIDATION * QUESTIONS * PROMPT
    return {
        "read": SIZE / machine.read,
        "decompositions": EDITED * sum(machine.decompose(STACK, "mild")),
        "passes": machine.passes(tokens * LAYER * (LAYERS + TRIALS * EDITED / 2)),
    }


def tasks() -> list[Task]:
    unit = BYTES * max(prod(STACK), GEOMETRY.D * GEOMETRY.F, EMBEDDING)
    streaming = BASE_BYTES + SHARD_BYTES + 2 * unit + WORKING_COPIES * 4 * prod(STACK)
    covariances = 8 * GEOMETRY.D**2 * (sum(len(c) ** 2 for c in CLUSTERS) + len(CLUSTERS) + COPIES)
    remembered = BYTES * TOKENS * GEOMETRY.D  # what attention gave; hidden states are on disk
    kept = BYTES * VALIDATION * QUESTIONS * PROMPT * GEOMETRY.D * EDITED
    fitting = covariances + remembered + 2 * BYTES * LAYER + COPIES * 4 * GEOMETRY.D * GEOMETRY.F
    return [
        *(
            Task(f"compress, {share} ranks", partial(compress, share=share), streaming, SIZE)
            for share in ("strong", "mild")
        ),
        Task("activation-hybrid", fit, fitting, SIZE / 2),
        Task("evaluate", evaluate, SIZE, 0),
        Task("search", search, SIZE + kept, 0),
    ]


def summary_table(value: Lookup) -> str:
    """Time on each machine with its bottleneck, memory and disk."""
    rows = []
    for task in tasks():
        times = []
        for machine in machines():
            steps = task.steps(machine)
            slowest = max(steps, key=lambda step: steps[step])
            share = steps[slowest] / sum(steps.values())
            times.append(f"{span(sum(steps.values()))} ({slowest} {share:.0%})")
        disk = amount(task.disk, "bytes") if task.disk else ""
        rows.append((task.name, *times, amount(task.memory, "bytes"), disk))
    names = tuple(machine.name for machine in machines())
    return table(("task", *names, "memory", "written"), rows)


def steps_table(value: Lookup, name: str) -> str:
    """One task, step by step."""
    task = next(task for task in tasks() if task.name == name)
    by_machine = [task.steps(machine) for machine in machines()]
    rows = [(step, *(span(steps[step]) for steps in by_machine)) for step in by_machine[0]]
    rows.append(("together", *(f"**{span(sum(steps.values()))}**" for steps in by_machine)))
    return table(("step", *(machine.name for machine in machines())), rows)


def machines_table(value: Lookup) -> str:
    """Per second, and seconds of an eigenproblem."""
    rows = [
        ("10⁹ multiply-adds, float32", *(figure(m.macs["float32"] / 1e9) for m in machines())),
        ("10⁹ multiply-adds, float64", *(figure(m.macs["float64"] / 1e9) for m in machines())),
        ("GB read from disk", *(figure(m.read / 1e9) for m in machines())),
        ("GB written and synced", *(figure(m.write / 1e9) for m in machines())),
        ("GB hashed", *(figure(m.hashed / 1e9) for m in machines())),
        ("GB of memory, or to it from a GPU", *(figure(m.moved / 1e9) for m in machines())),
        *(
            (f"s, eigenvectors of order {ORDER}, {d}", *(figure(m.eigen_s[d]) for m in machines()))
            for d in ("float32", "float64")
        ),
    ]
    return table(("per second", *(machine.name for machine in machines())), rows)


def check_table(value: Lookup) -> str:
    """The formula beside the layers that were timed; it is fitted to the slowest of them."""
    rows = []
    for name, sizes, share, measured in measured_layers():
        foreseen = sum(machines()[0].decompose(sizes, share))
        cells = (amount(foreseen, "s"), amount(measured, "s"), figure(foreseen / measured))
        rows.append((name, *cells))
    return table(("layer", "formula", "measured", "ratio"), rows)


def curves_table(value: Lookup) -> str:
    """Every measured curve: sizes, seconds and the exponent, beside that of the counts."""
    rows = []
    for part in scaling().values():
        for name, curve in part["curves"].items():
            if "points" not in curve:
                continue
            (x0, y0), (x1, y1) = curve["points"][0], curve["points"][-1]
            unit = "bytes" if x1 > 1e6 and "bytes" in curve["over"] else ""
            sizes = f"{amount(x0, unit).strip()} to {amount(x1, unit).strip()}"
            times = f"{amount(y0, 's')} to {amount(y1, 's')}"
            found = f"{curve['exponent']:.2f} ± {curve['plus_minus']:.2f}"
            rows.append((name, curve["over"], sizes, times, found, figure(curve["expected"])))
    return table(("cost", "over", "from, to", "takes", "exponent", "counted"), rows)


def numbers() -> dict[str, Any]:
    """What the text of docs/scaling.md quotes."""
    sizes = {"D": GEOMETRY.D, "layers": LAYERS, "F": GEOMETRY.F, "stack": "×".join(map(str, STACK))}
    strong, mild = (ranks_at(share, *STACK[:3]) for share in ("strong", "mild"))
    stored = [tucker_parameters(STACK, dict(enumerate(r))) for r in (strong, mild)]
    return {
        **sizes,
        "parameters": PARAMETERS / 1e9,
        "gigabytes": SIZE / 1e9,
        "attention": prod(STACK) / 1e6,
        "strong_ranks": str(strong),
        "mild_ranks": str(mild),
        "strong_ratio": prod(STACK) / stored[0],
        "mild_ratio": prod(STACK) / stored[1],
        "tokens": TOKENS,
        "questions": QUESTIONS,
        "prompt": PROMPT,
        "trials": TRIALS,
        "edited": EDITED,
        "covariance": 8 * GEOMETRY.D**2 / 1e9,
        "covariances": 8 * GEOMETRY.D**2 * sum(len(c) ** 2 for c in CLUSTERS) / 1e9,
        **assumptions(),
    }


TABLES: dict[str, Callable[..., str]] = {
    "plan": summary_table,
    "plan-steps": steps_table,
    "plan-machines": machines_table,
    "plan-check": check_table,
    "plan-curves": curves_table,
    "plan-layers": layers_table,
}
