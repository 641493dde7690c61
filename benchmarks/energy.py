"""`python benchmarks/energy.py`: ranks from the weights alone against searched ones, at equal size.

Shared Tucker ranks of one layer's attention, and of the attention of all layers, that store at most
1/ratio of its numbers, by

- equal energy: the largest share of the energy, the same in every mode and layer, that fits;
- marginal error: the allocator (`compress --target-ratio`);
- noise edge: what lies above the Marchenko-Pastur edge, whatever its size;
- searched: for each R2 and R3 the largest R1 that fits, the same ranks in all layers, the best of
  these on validation.

The demo's accuracy is on questions, and the perplexity of tinystories-656K on
stories, that nothing was chosen on.
"""

import argparse
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.results import Comparison, begin, parser, real, save

from tensorllm.checkpoint.loader import Loader
from tensorllm.compression.engine import compressed
from tensorllm.compression.plan import plan_jobs
from tensorllm.compression.units import open_checkpoint
from tensorllm.compressors import PerLayer, SharedTucker4D
from tensorllm.data.base import ReasoningDataModule
from tensorllm.data.demo import MODEL_DIR
from tensorllm.evaluation.evaluate import evaluate_model, make_dataset
from tensorllm.tensors.allocation import allocate
from tensorllm.tensors.energy import Energy, tucker_energy, tucker_stored
from tensorllm.tensors.ranks import marchenko_pastur_edge, ranks_for_energy
from tensorllm.weights import stacked

Ranks = tuple[int, ...]

RATIOS = (1.2, 1.5, 2.0)
MODEL, STORIES = "models/tinystories-656K", "data/tinystories_1000.json"


class Subject:
    """A model and what it is asked: on validation, and on the test part."""

    def __init__(self, folder: Path, parts: dict[str, ReasoningDataModule]) -> None:
        self.folder, self.parts = folder, parts
        loader = Loader(folder)
        self.model, self.tokenizer = loader(), loader.tokenizer()

    def score(self, part: str, edits: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Accuracy (where there is one), loss and perplexity of the model with these edits."""
        if not edits:
            found = evaluate_model(self.model, self.tokenizer, self.parts[part])
        else:
            with compressed(self.model, PerLayer(edits=tuple(edits))):
                found = evaluate_model(self.model, self.tokenizer, self.parts[part])
        loss, accuracy = float(found["loss"]), found.get("accuracy")
        out = {"loss": loss, "perplexity": math.exp(loss)}
        return out if accuracy is None else {"accuracy": float(accuracy), **out}


@dataclass(frozen=True)
class Layer:
    """One layer's attention, and its energy."""

    number: int
    energy: Energy

    def edit(self, ranks: Ranks) -> dict[str, Any]:
        """As `PerLayer` takes it."""
        return {"layers": [self.number], "mode": "shared-tucker", "ranks": list(ranks)}


Chosen = Sequence[Ranks | None]  # of each layer; None: as it is


def energies(folder: Path, layers: Sequence[int] | None) -> list[Layer]:
    """Read layer by layer from the folder's files."""
    checkpoint, roles = open_checkpoint(folder)
    wanted = range(roles.layers) if layers is None else layers
    out = []
    for job in plan_jobs(SharedTucker4D(ranks=(1, 1, 1)), roles, wanted):
        weights = checkpoint.read({roles.name(*matrix) for matrix in job.site.matrices})
        w = stacked(job.site, roles, weights)
        out.append(Layer(job.site.layers[0], tucker_energy(w, (0, 1, 2))))
    return out


def stored(layers: Sequence[Layer], chosen: Chosen) -> int:
    return sum(
        layer.energy.numbers
        if ranks is None
        else int(tucker_stored(layer.energy.shape, torch.tensor([ranks])))
        for layer, ranks in zip(layers, chosen, strict=True)
    )


def numbers(layers: Sequence[Layer]) -> int:
    return sum(layer.energy.numbers for layer in layers)


def equal_energy(layers: Sequence[Layer], ratio: float) -> Chosen:
    """The largest share of energy, the same in every mode and layer, that fits; by bisection."""
    low, high = 1e-12, 1.0
    for _ in range(40):
        share = (low + high) / 2
        fits = numbers(layers) / stored(layers, by_share(layers, share)) >= ratio
        low, high = (share, high) if fits else (low, share)
    return by_share(layers, low)


def by_share(layers: Sequence[Layer], share: float) -> Chosen:
    return [tuple(ranks_for_energy(layer.energy.spectra, share).values()) for layer in layers]


def noise_edge(layers: Sequence[Layer]) -> Chosen:
    """The singular values that independent noise would not have.

    The noise's deviation is that for which the median singular value of an unfolding is the median
    of the Marchenko-Pastur law; see Gavish and Donoho, "The optimal hard threshold for singular
    values is 4/sqrt(3)", IEEE Trans. Inf. Theory 2014, section III.E.
    """
    return [tuple(above_edge(layer.energy)) for layer in layers]


def above_edge(energy: Energy) -> Iterator[int]:
    for axis, values in energy.spectra.items():
        rows, columns = energy.shape[axis], energy.numbers // energy.shape[axis]
        small, large = sorted((rows, columns))
        sigma = float(values.median()) / math.sqrt(large * median(small / large))
        yield max(1, int((values > marchenko_pastur_edge((rows, columns), sigma)).sum()))


def median(aspect: float, points: int = 20_001) -> float:
    """The median of the Marchenko-Pastur law of squared singular values, by the trapezoid rule."""
    low, high = (1 - math.sqrt(aspect)) ** 2, (1 + math.sqrt(aspect)) ** 2
    x = np.linspace(low, high, points)[1:-1]
    below = np.cumsum(np.sqrt((high - x) * (x - low)) / x)
    return float(x[int(np.searchsorted(below, below[-1] / 2))])


def marginal_error(layers: Sequence[Layer], ratio: float) -> Chosen:
    """What `compress --target-ratio` chooses."""
    found = [layer.energy.curve(partial(tucker_stored, layer.energy.shape)) for layer in layers]
    budget = math.floor(numbers(layers) / ratio)
    choices = allocate([[[curve]] for curve, _ in found], budget)
    picked = [s[c.ranks[0] - 1].tolist() for (_, s), c in zip(found, choices, strict=True)]
    return [tuple(ranks) if any(ranks) else None for ranks in picked]


def candidates(layers: Sequence[Layer], ratio: float, quick: bool) -> Iterator[Ranks]:
    """Equal ranks of all layers that just fit the size."""
    energy = layers[0].energy
    width, head, matrices = energy.energy.shape
    budget = energy.numbers / ratio
    heads = sorted({max(1, round(share * head / 8)) for share in range(2, 9)})
    for r2, r3 in itertools.product(heads[-2:] if quick else heads, range(1, matrices + 1)):
        ranks_NC = torch.tensor([(r1, r2, r3) for r1 in range(1, width + 1)])
        fits = (tucker_stored(energy.shape, ranks_NC) <= budget) & (
            ranks_NC[:, 0] <= r2 * r3 * energy.shape[3]
        )
        if bool(fits.any()):
            r1, *_ = ranks_NC[fits][-1].tolist()
            yield (r1, r2, r3)


def searched(
    subject: Subject, layers: Sequence[Layer], ratio: float, quick: bool
) -> tuple[Chosen, int]:
    """The best of the candidates on validation, and how many there were."""
    tried = []
    for ranks in candidates(layers, ratio, quick):
        found = subject.score("val", [layer.edit(ranks) for layer in layers])
        tried.append((-found.get("accuracy", 0.0), found["loss"], ranks))
    return [min(tried)[2]] * len(layers), len(tried)


def compare(
    subject: Subject, layers: Sequence[int] | None, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row per ratio and rule."""
    found = energies(subject.folder, layers)
    scope = "attention of all layers" if layers is None else f"attention of layer {layers[0]}"
    rows = []

    def add(rule: str, ratio: float | None, chosen: Chosen, **more: Any) -> None:
        pairs = zip(found, chosen, strict=True)
        edits = [layer.edit(ranks) for layer, ranks in pairs if ranks is not None]
        row = {
            "scope": scope,
            "ratio": ratio,
            "rule": rule,
            "reached": numbers(found) / stored(found, chosen),
            "ranks": [edit["ranks"] for edit in edits],
            **more,
            **subject.score("test", edits),
        }
        rows.append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)

    add("original", None, [None] * len(found))
    add("noise edge", None, noise_edge(found))
    for ratio in RATIOS[-1:] if args.quick else RATIOS:
        add("equal energy", ratio, equal_energy(found, ratio))
        add("marginal error", ratio, marginal_error(found, ratio))
        best, tried = searched(subject, found, ratio, args.quick)
        add("searched", ratio, best, tried=tried)
    return rows


def comparisons(rows: Sequence[dict[str, Any]], metric: str, unit: str) -> dict[str, Comparison]:
    """The allocator beside equal energies and beside the searched ranks."""
    out = {}
    by = {(row["scope"], row["ratio"], row["rule"]): row[metric] for row in rows}
    for (scope, ratio, rule), value in by.items():
        if rule != "marginal error":
            continue
        for peer in ("equal energy", "searched"):
            out[f"{scope}, ratio {ratio:g}, {metric}, beside {peer}"] = Comparison(
                ours=value,
                unit=unit,
                peer=by[scope, ratio, peer],
                peer_name=peer,
                more_is_better=metric == "accuracy",
            )
    return out


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--part", choices=("demo", "tinystories"), help="one of them only")
    args = options.parse_args()
    begin(args)
    if args.part != "tinystories":
        demo(args)
    if args.part != "demo":
        tinystories(args)


def demo(args: argparse.Namespace) -> None:
    limit = 40 if args.quick else None
    parts = {part: make_dataset("demo", split=part, limit=limit) for part in ("val", "test")}
    subject = Subject(MODEL_DIR, parts)
    rows = [row for layers in ((3,), None) for row in compare(subject, layers, args)]
    save("energy", "demo", comparisons(rows, "accuracy", "%"), args, rows=rows)


def tinystories(args: argparse.Namespace) -> None:
    file, few = real(args, STORIES), args.quick
    parts = {
        part: make_dataset("text", data_file=file, split=part, limit=4 if few else limit)
        for part, limit in (("val", 40), ("test", 80))
    }
    subject = Subject(real(args, MODEL), parts)
    rows = [row for layers in ((1,), None) for row in compare(subject, layers, args)]
    save("energy", "tinystories", comparisons(rows, "perplexity", "nats, exp"), args, rows=rows)


if __name__ == "__main__":
    main()
