"""Whole models at equal size: ours beside SVD, SharedTucker4D, ASVD, SVD-LLM and AA-SVD.

    python benchmarks/whole_model.py
    python benchmarks/whole_model.py --models demo --seeds 5 6 --add

Each model is a part of docs/results/whole_model.json. Seeds run side by side, one process for each
of --threads. What is calibrated on and scored, in nats per token, is in whole_model_texts.py. The
share of the gap that a method closes is (SVD-LLM's loss - its loss) / (SVD-LLM's - the dense's).
Times and memory are measured apart: whole_model_cost.py.
"""

import argparse
import copy
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from support.closed_gap import summary
from support.results import RESULTS, Comparison, begin, parser, save
from support.stored import stored_numbers
from support.whole_model_texts import demo, stories
from torch import nn

from tensorllm.calibration import Calibration, fit
from tensorllm.calibration.fit import measure_for
from tensorllm.compression.engine import compress
from tensorllm.compressors import (
    ActivationHybrid,
    ActivationTucker,
    Hybrid,
    PlainSVD,
    SharedTucker4D,
)
from tensorllm.compressors.settings import make_compressor
from tensorllm.data.demo import MODEL_DIR
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.tensors.ranks import tucker_parameters
from tensorllm.tensors.stacking import ATTENTION, FFN
from tensorllm.tensors.tucker import relative_error, tucker

SCOPES: dict[str, type[ActivationTucker]] = {
    "attention": ActivationTucker,
    "whole model": ActivationHybrid,
}
ROLES = {"attention": ATTENTION, "whole model": ATTENTION + FFN}
MODELS = ("tinystories", "demo")
RATIOS = (1.2, 1.5, 2.0, 3.0)
VARIANTS: tuple[dict[str, Any], ...] = (
    {"refit_epochs": 0},
    {"weighting": "loss"},
    {"distill_steps": 300},
)
WANTED = 40.0  # per cent of the gap


class Bench:
    """The dense model, the texts that it is scored on, and the table of results."""

    def __init__(self, name: str, shared: Path, quick: bool) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = MODEL_DIR if name == "demo" else shared / "models/tinystories-656K"
        self.dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.source = demo(tokenizer) if name == "demo" else stories(tokenizer, shared)
        most = 16 if quick else None
        self.texts = {name: some[:most] for name, some in self.source.scored.items()}
        self.roles = RoleMatrices(self.dense.config, parameters_of(self.dense))
        self.rows: list[dict[str, Any]] = []
        self.ratios = RATIOS[2:3] if quick else RATIOS
        self.variants = () if quick else VARIANTS
        self.settings = {"refit_epochs": 1} if quick else {}
        self.drawn = self.source.drawn // (8 if quick else 1)

    def calibration(self, seed: int) -> Calibration:
        texts, draws = self.source.calibration, torch.Generator().manual_seed(seed)
        order = torch.randperm(len(texts), generator=draws)[: self.drawn].tolist()
        return Calibration(tuple(tuple(texts[i]) for i in order), source="benchmark", seed=seed)

    @torch.no_grad()
    def loss(self, model: nn.Module) -> dict[str, float]:
        """Nats per predicted token on each text."""
        out = {}
        for name, sequences in self.texts.items():
            total, tokens = 0.0, 0
            for batch in Calibration(tuple(map(tuple, sequences))).batches():
                mask = batch.mask_BT
                logits = model(batch.ids_BT, attention_mask=mask.long()).logits[:, :-1]
                wanted = mask[:, 1:]
                if self.source.last_only:  # the token before the padding
                    wanted = wanted & (mask.cumsum(1) == mask.sum(1, keepdim=True))[:, 1:]
                total += float(
                    nn.functional.cross_entropy(
                        logits[wanted], batch.ids_BT[:, 1:][wanted], reduction="sum"
                    )
                )
                tokens += int(wanted.sum())
            out[name] = total / tokens
        return out

    def add(self, scope: str, ratio: float, method: str, seed: int | None, **more: Any) -> None:
        row = {"scope": scope, "ratio": ratio, "method": method, "seed": seed, **more}
        self.rows.append(row)
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)

    def baseline(
        self, scope: str, ratio: float, method: str, seed: int | None, text: Calibration | None
    ) -> None:
        """A mode of the field at the same share of every matrix."""
        roles = [role for role in ROLES[scope] if role in self.roles.spec.geometry(0).roles]
        wanted = make_compressor(method, {"kept": 1 / ratio, "matrices": roles})
        model = copy.deepcopy(self.dense)
        report = compress(model, wanted, calibration=text)
        stored = stored_numbers(self.roles.spec, report, ROLES[scope])
        self.add(scope, ratio, method, seed, parameters=stored, **self.loss(model))

    def shared_tucker(self, scope: str, ratio: float) -> None:
        """SharedTucker4D of each layer's attention at its best ranks, plain SVD of the FFN."""
        model = copy.deepcopy(self.dense)
        site = SharedTucker4D(ranks=(1, 1, 1)).jobs(self.roles.spec, (0,))[0].site
        weights = parameters_of(self.dense)
        first = [self.roles.read(weights, *matrix) for matrix in site.matrices]
        attention = SharedTucker4D(
            ranks=tucker_ranks(site.stack(first, self.roles.spec.geometry(0)), ratio)
        )
        ffn = [r for r in self.roles.spec.geometry(0).roles if r in FFN and r in ROLES[scope]]
        wanted: Any = attention
        if ffn:
            wanted = Hybrid(attention=attention, ffn=PlainSVD(kept=1 / ratio, matrices=tuple(ffn)))
        report = compress(model, wanted)
        stored = stored_numbers(self.roles.spec, report, ROLES[scope])
        self.add(scope, ratio, "shared-tucker", None, parameters=stored, **self.loss(model))

    def ours(self, scope: str, ratio: float, seed: int, text: Calibration, **more: Any) -> None:
        covariances = more.pop("covariances")
        model = copy.deepcopy(self.dense)
        wanted = SCOPES[scope](target_ratio=ratio, **self.settings, **more)
        report = compress(model, fit(wanted, model, text, covariances=covariances))
        stored = stored_numbers(self.roles.spec, report, ROLES[scope])
        name = " ".join(["ours", *(f"{key}={value}" for key, value in more.items())])
        self.add(scope, ratio, name, seed, parameters=stored, **self.loss(model))


def tucker_ranks(w_DKMG: torch.Tensor, ratio: float) -> tuple[int, int, int]:
    """Of all ranks on a grid that meet the ratio, those with the least error on this layer."""
    sizes, found = tuple(w_DKMG.shape), []
    for r2 in sorted({sizes[1] * eighths // 8 for eighths in range(4, 9)}):
        for r3 in range(2, sizes[2] + 1):
            stored = [
                tucker_parameters(sizes, {0: r, 1: r2, 2: r3}) for r in range(1, sizes[0] + 1)
            ]
            r1 = sum(numbers <= w_DKMG.numel() / ratio for numbers in stored)
            if r1:
                error = relative_error(w_DKMG, tucker(w_DKMG, {0: r1, 1: r2, 2: r3}))
                found.append((error, (r1, r2, r3)))
    return min(found)[1]


def run_seed(bench: Bench, seed: int) -> None:
    """All methods that look at text, on one draw of it; variants of ours on the first."""
    text = bench.calibration(seed)
    known = measure_for(ActivationHybrid(target_ratio=2), bench.dense, text)
    for scope in SCOPES:
        for ratio in bench.ratios:
            for method in ("asvd", "svd-llm", "svd-llm-sequential", "aa-svd"):
                bench.baseline(scope, ratio, method, seed, text)
            bench.ours(scope, ratio, seed, text, covariances=known)
    for settings in bench.variants if seed == 0 else ():
        given = None if "weighting" in settings else known
        bench.ours("whole model", bench.ratios[-1], seed, text, covariances=given, **settings)


def run_without_text(bench: Bench) -> None:
    """The methods that need no calibration."""
    for scope in SCOPES:
        for ratio in bench.ratios:
            bench.baseline(scope, ratio, "svd", None, None)
            bench.shared_tucker(scope, ratio)


def seed_rows(name: str, shared: Path, quick: bool, seed: int) -> list[dict[str, Any]]:
    """What `run_seed` finds, in a process of its own."""
    torch.set_num_threads(1)
    bench = Bench(name, shared, quick)
    run_seed(bench, seed)
    return bench.rows


def run_model(name: str, args: argparse.Namespace) -> None:
    """One part of the results: everything on one model, saved anew after every seed."""
    bench = Bench(name, args.shared, args.quick)
    dense, known = bench.loss(bench.dense), recorded(name) if args.add else {"rows": []}
    bench.rows += [row for row in known["rows"] if row["seed"] not in (None, *args.seeds)]
    with ProcessPoolExecutor(args.threads, get_context("spawn")) as pool:
        jobs = {pool.submit(seed_rows, name, args.shared, args.quick, s): s for s in args.seeds}
        run_without_text(bench)
        for job in as_completed(jobs):
            bench.rows += job.result()
            found = summary(bench.rows, dense)
            save(
                "whole_model",
                name,
                comparisons(found),
                args,
                tokens={text: sum(map(len, some)) for text, some in bench.texts.items()},
                dense=dense,
                seeds=sorted({row["seed"] for row in bench.rows} - {None}),
                earlier=[*known.get("earlier", []), known["commit"]] if args.add else [],
                summary=found,
                rows=bench.rows,
            )


def recorded(name: str) -> dict[str, Any]:
    """The part of the results that other seeds have made."""
    found: dict[str, Any] = json.loads((RESULTS / "whole_model.json").read_text())[name]
    return found


def comparisons(found: Sequence[dict[str, Any]]) -> dict[str, Comparison]:
    """What ours closes of the gap between SVD-LLM and the dense model."""
    return {
        f"{entry['scope']} at {entry['ratio']:g}, {text}": Comparison(
            ours=100 * entry[f"{text} closed"]["mean"], unit="% of the gap", wanted=WANTED
        )
        for entry in found
        for text in entry
        if entry["method"] == "ours" and f"{text} closed" in entry
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options.add_argument("--add", action="store_true", help="keep what other seeds have found")
    args = options.parse_args()
    begin(args)
    if args.quick:
        args.models, args.seeds = ["demo"], [0]
    for name in args.models:
        run_model(name, args)


if __name__ == "__main__":
    main()
