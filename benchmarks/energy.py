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
from pathlib import Path
from typing import Any

import torch
from results import Comparison, begin, parser, real, save

from tensorllm.checkpoint.loader import Loader
from tensorllm.commands.allocate import energies
from tensorllm.compression.engine import compressed
from tensorllm.compressors import PerLayer, SharedTucker4D
from tensorllm.data.base import ReasoningDataModule
from tensorllm.data.demo import MODEL_DIR
from tensorllm.evaluation.evaluate import evaluate_model, make_dataset
from tensorllm.search.energy import Allocation, by_energy_at, by_noise_edge, by_ratio, edits_of
from tensorllm.search.sites import Ranks, SiteEnergy

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


def candidates(sites: Sequence[SiteEnergy], ratio: float, quick: bool) -> Iterator[Ranks]:
    """Equal ranks of all layers that just fit the size."""
    width, head, matrices = sites[0].energy.shape
    budget = sites[0].numbers / ratio
    heads = sorted({max(1, round(share * head / 8)) for share in range(2, 9)})
    for r2, r3 in itertools.product(heads[-2:] if quick else heads, range(1, matrices + 1)):
        ranks_NC = torch.tensor([(r1, r2, r3) for r1 in range(1, width + 1)])
        fits = (sites[0].stored(ranks_NC) <= budget) & (
            ranks_NC[:, 0] <= r2 * r3 * sites[0].shape[3]
        )
        if bool(fits.any()):
            r1, *_ = ranks_NC[fits][-1].tolist()
            yield (r1, r2, r3)


def searched(
    subject: Subject, sites: Sequence[SiteEnergy], ratio: float, quick: bool
) -> tuple[list[dict[str, Any]], int]:
    """The best of the candidates on validation, and how many there were."""
    tried = []
    for ranks in candidates(sites, ratio, quick):
        edits = [site.edit(ranks) for site in sites]
        found = subject.score("val", edits)
        tried.append((-found.get("accuracy", 0.0), found["loss"], ranks, edits))
    return min(tried, key=lambda one: one[:3])[3], len(tried)


def compare(
    subject: Subject, layers: Sequence[int] | None, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row per ratio and rule."""
    sites = energies(subject.folder, SharedTucker4D(ranks=(1, 1, 1)), layers)
    scope = "attention of all layers" if layers is None else f"attention of layer {layers[0]}"
    rows = []

    def add(rule: str, ratio: float | None, edits: Sequence[dict[str, Any]], **more: Any) -> None:
        stored = sum(
            int(site.stored(torch.tensor([edit["ranks"]])))
            for site in sites
            for edit in edits
            if edit["layers"] == list(site.job.site.layers)
        )
        left = sum(
            s.numbers for s in sites if not any(s.job.site.layers[0] in e["layers"] for e in edits)
        )
        row = {
            "scope": scope,
            "ratio": ratio,
            "rule": rule,
            "reached": sum(site.numbers for site in sites) / (stored + left),
            "ranks": [edit["ranks"] for edit in edits],
            **more,
            **subject.score("test", edits),
        }
        rows.append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)

    def by_rule(rule: str, ratio: float | None, found: Allocation) -> None:
        add(rule, ratio, edits_of(sites, found), error=found.error)

    add("original", None, [])
    by_rule("noise edge", None, by_noise_edge(sites))
    for ratio in RATIOS[-1:] if args.quick else RATIOS:
        by_rule("equal energy", ratio, by_energy_at(sites, ratio)[1])
        by_rule("marginal error", ratio, by_ratio(sites, ratio))
        best, tried = searched(subject, sites, ratio, args.quick)
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
