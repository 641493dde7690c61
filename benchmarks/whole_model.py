"""Whole models at equal size: ours beside SVD, SharedTucker4D, ASVD and SVD-LLM.

    python benchmarks/whole_model.py --shared SHARED --model tinystories --seeds 0 1
    python benchmarks/whole_model.py --model demo
    python benchmarks/closed_gap.py docs/results/whole_model.json

Each run adds the rows of its model and seeds to the results (--out); closed_gap.py prints them as
tables. What is calibrated on and scored, in nats per token, is in whole_model_texts.py. The share
of the gap that a method closes is (SVD-LLM's loss - its loss) / (SVD-LLM's loss - the dense's).
"""

import copy
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from baselines import asvd, rank_at, svd, svd_llm, tucker_ranks
from closed_gap import summary
from inputs import Matrix, input_moments, mean_abs
from results import RESULTS, Comparison, begin, made, parser
from torch import nn
from whole_model_texts import demo, stories

from tensorllm.architectures import RoleMatrices, parameters_of
from tensorllm.calibration import Calibration, fit
from tensorllm.calibration.fit import measure_for
from tensorllm.compression.model import compress
from tensorllm.compressors import ActivationHybrid, ActivationTucker, SharedTucker4D
from tensorllm.data.demo import MODEL_DIR
from tensorllm.tensors.pivoted import pivoted_parameters

SCOPES: dict[str, type[ActivationTucker]] = {
    "attention": ActivationTucker,
    "whole model": ActivationHybrid,
}
RATIOS = (1.2, 1.5, 2.0, 3.0)
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
        self.drawn = self.source.drawn // (8 if quick else 1)

    def calibration(self, seed: int) -> Calibration:
        told, draws = self.source.told, torch.Generator().manual_seed(seed)
        order = torch.randperm(len(told), generator=draws)[: self.drawn].tolist()
        return Calibration(tuple(tuple(told[i]) for i in order), source="benchmark", seed=seed)

    def matrices(self, scope: str) -> list[Matrix]:
        clusters = SCOPES[scope](target_ratio=2).clusters(self.roles.geometry)
        return [(i, role) for i in range(self.roles.layers) for c in clusters for role in c]

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

    def map(self, weights: dict[str, torch.Tensor], layer: int, role: str) -> torch.Tensor:
        """The matrix from inputs to outputs (Y, X)."""
        w_ID = self.roles.read(weights, layer, role)
        return w_ID.mT if role in ("o", "out") else w_ID

    def put(
        self, weights: dict[str, torch.Tensor], layer: int, role: str, w_YX: torch.Tensor
    ) -> None:
        self.roles.write(weights, layer, role, w_YX.mT if role in ("o", "out") else w_YX)

    def add(self, scope: str, ratio: float, method: str, seed: int | None, **more: Any) -> None:
        row = {"scope": scope, "ratio": ratio, "method": method, "seed": seed, **more}
        self.rows.append(row)
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)

    def per_matrix(
        self, scope: str, ratio: float, method: str, seed: int | None, of: Callable[..., Any]
    ) -> None:
        """Score the model whose matrices are replaced by `of(w, matrix, rank)`, timed."""
        started = time.perf_counter()
        model = copy.deepcopy(self.dense)
        weights, stored = parameters_of(model), 0
        for layer, role in self.matrices(scope):
            w_YX = self.map(weights, layer, role)
            shape = (w_YX.shape[0], w_YX.shape[1])
            rank = rank_at(shape, ratio)
            if method.endswith("pivoted"):
                rank = _pivoted_rank(shape, ratio)
                stored += pivoted_parameters(shape, rank)
            else:
                stored += rank * sum(shape)
            self.put(weights, layer, role, of(w_YX, (layer, role), rank))
        seconds = time.perf_counter() - started
        loss = self.loss(model)
        self.add(scope, ratio, method, seed, parameters=stored, seconds=seconds, **loss)

    def shared_tucker(self, scope: str, ratio: float) -> None:
        """SharedTucker4D of each layer's attention at its best ranks, plain SVD of the FFN."""
        model, stored = copy.deepcopy(self.dense), 0
        site = SharedTucker4D(ranks=(1, 1, 1)).sites(self.roles.geometry, (0,))[0].site
        weights = parameters_of(self.dense)
        first = [self.roles.read(weights, *matrix) for matrix in site.matrices]
        ranks = tucker_ranks(site.stack(first, self.roles.geometry), ratio)
        report = compress(model, SharedTucker4D(ranks=ranks))
        stored = sum(site.parameters_after for site in report.sites)
        for layer, role in self.matrices(scope):
            if role in ("in", "gate", "out"):
                w_YX = self.map(parameters_of(model), layer, role)
                rank = rank_at((w_YX.shape[0], w_YX.shape[1]), ratio)
                stored += rank * sum(w_YX.shape)
                self.put(parameters_of(model), layer, role, svd(w_YX, rank))
        self.add(scope, ratio, "shared-tucker", None, parameters=stored, **self.loss(model))

    def ours(self, scope: str, ratio: float, seed: int, text: Calibration, **more: Any) -> None:
        moments = more.pop("moments", None)
        started = time.perf_counter()
        model = copy.deepcopy(self.dense)
        wanted = SCOPES[scope](target_ratio=ratio, **more)
        report = compress(model, fit(wanted, model, text, moments=moments))
        seconds = time.perf_counter() - started
        stored = sum(site.parameters_after for site in report.sites)
        name = " ".join(["ours", *(f"{key}={value}" for key, value in more.items())])
        self.add(scope, ratio, name, seed, parameters=stored, seconds=seconds, **self.loss(model))


def _pivoted_rank(shape: tuple[int, int], ratio: float) -> int:
    budget = shape[0] * shape[1] / ratio
    fits = [r for r in range(1, min(shape) + 1) if pivoted_parameters(shape, r) <= budget]
    return fits[-1]


def run_seed(bench: Bench, seed: int) -> None:
    """All methods that look at text, on one draw of it; the loss-weighted one on the first."""
    text = bench.calibration(seed)
    started = time.perf_counter()
    at = (bench.dense, bench.roles, bench.matrices("whole model"))
    seen = input_moments(*at, text)
    bench.add("whole model", 0.0, "svd-llm moments", seed, seconds=time.perf_counter() - started)
    scales = mean_abs(*at, text)
    felt = {}
    for weighting in ("outputs", "loss") if seed == 0 else ("outputs",):
        started = time.perf_counter()
        wanted = ActivationHybrid(target_ratio=2, weighting=weighting)
        felt[weighting] = measure_for(wanted, bench.dense, text)
        seconds = time.perf_counter() - started
        bench.add("whole model", 0.0, f"{weighting} moments", seed, seconds=seconds)
    for scope in SCOPES:
        for ratio in bench.ratios:
            bench.per_matrix(scope, ratio, "asvd", seed, lambda w, m, r: asvd(w, scales[m], r))
            for method in ("svd-llm", "svd-llm pivoted"):
                bench.per_matrix(scope, ratio, method, seed, lambda w, m, r: svd_llm(w, seen[m], r))
            bench.ours(scope, ratio, seed, text, moments=felt["outputs"])
            if seed == 0:
                bench.ours(scope, ratio, seed, text, weighting="loss", moments=felt["loss"])


def run_without_text(bench: Bench) -> None:
    """The methods that need no calibration."""
    for scope in SCOPES:
        for ratio in bench.ratios:
            bench.per_matrix(scope, ratio, "svd", None, lambda w, m, r: svd(w, r))
            bench.shared_tucker(scope, ratio)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shared", type=Path, default=os.environ.get("TENSORLLM_SHARED"))
    options.add_argument("--model", choices=("tinystories", "demo"), default="tinystories")
    options.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    args = options.parse_args()
    begin(args)
    if args.quick:
        args.model, args.seeds = "demo", [0]
    bench = Bench(args.model, args.shared or Path("../shared"), args.quick)
    dense = bench.loss(bench.dense)
    if 0 in args.seeds:
        run_without_text(bench)
    out = args.out or (None if args.quick else RESULTS / "whole_model.json")
    for number, seed in enumerate(args.seeds, 1):
        run_seed(bench, seed)
        if out:
            save(out, args.model, bench, dense, args.seeds[:number])


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


def save(
    path: Path, model: str, bench: Bench, dense: dict[str, float], seeds: Sequence[int]
) -> None:
    """Put the rows of these seeds in place of what the file has of them."""
    results = json.loads(path.read_text()) if path.exists() else {}
    again = [*seeds, *([None] if 0 in seeds else [])]
    old = results.get(model, {"rows": []})["rows"]
    rows = [row for row in old if row["seed"] not in again] + bench.rows
    found = summary(rows, dense)
    compared = {what: one.to_json() for what, one in comparisons(found).items()}
    results[model] = {
        **made(),
        "comparisons": compared,
        "tokens": {text: sum(map(len, some)) for text, some in bench.texts.items()},
        "dense": dense,
        "seeds": sorted({row["seed"] for row in rows if row["seed"] is not None}),
        "summary": found,
        "rows": rows,
    }
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
