"""Whole models at equal size: ours beside SVD, SharedTucker4D, ASVD and SVD-LLM.

    python benchmarks/whole_model.py --shared FOLDER --out docs/results/whole_model.json

Per calibration seed: 128 of the first 800 stories to calibrate on; the loss (nats per token) on 64
stories never drawn from, and on WikiText-2 test. The share of the gap that a method closes is
(SVD-LLM's loss - its loss) / (SVD-LLM's loss - the dense model's). Results are written by seeds.
"""

import argparse
import copy
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from baselines import asvd, rank_at, svd, svd_llm, tucker_ranks
from torch import nn

from tensorllm.architectures import RoleMatrices, parameters_of
from tensorllm.calibration import Calibration, fit
from tensorllm.calibration.fit import measure_for
from tensorllm.calibration.moments import Moments, module_of
from tensorllm.compression.model import compress
from tensorllm.compressors import ActivationHybrid, ActivationTucker, SharedTucker4D
from tensorllm.environment import environment
from tensorllm.tensors.pivoted import pivoted_parameters

SCOPES: dict[str, type[ActivationTucker]] = {
    "attention": ActivationTucker,
    "whole model": ActivationHybrid,
}
RATIOS = (1.2, 1.5, 2.0, 3.0)
MODEL = "models/tinystories-656K"
Matrix = tuple[int, str]


class Bench:
    """The dense model, the texts that it is scored on, and the table of results."""

    def __init__(self, shared: Path, stories: int = 64, blocks: int = 24) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.dense = AutoModelForCausalLM.from_pretrained(shared / MODEL, dtype=torch.float32)
        self.dense.eval()
        self.tokenizer = AutoTokenizer.from_pretrained(shared / MODEL)
        self.stories: list[str] = json.loads((shared / "data/tinystories_1000.json").read_text())
        wikitext = (shared / "data/wikitext2_test.raw").read_text()
        ids = self.tokenizer(wikitext, verbose=False).input_ids
        self.texts = {
            "stories": self.encoded(self.stories[800 : 800 + stories]),
            "wikitext": [ids[i * 512 : (i + 1) * 512] for i in range(blocks)],
        }
        self.roles = RoleMatrices(self.dense.config, parameters_of(self.dense))
        self.rows: list[dict[str, Any]] = []

    def encoded(self, texts: list[str]) -> list[list[int]]:
        return [self.tokenizer(text).input_ids[:512] for text in texts]

    def calibration(self, seed: int, count: int = 128) -> Calibration:
        order = torch.randperm(800, generator=torch.Generator().manual_seed(seed))
        drawn = self.encoded([self.stories[i] for i in order[:count].tolist()])
        return Calibration(tuple(map(tuple, drawn)), source="tinystories", seed=seed)

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

    def per_matrix(
        self, scope: str, ratio: float, method: str, seed: int | None, of: Callable[..., Any]
    ) -> None:
        """Score the model whose matrices are replaced by `of(w, matrix, rank)`, timed."""
        started = time.perf_counter()
        model = copy.deepcopy(self.dense)
        stored = 0
        for layer, role in self.matrices(scope):
            w = module_of(model, self.roles, layer, role).weight.data
            rank = rank_at(tuple(w.shape), ratio)
            if method.endswith("pivoted"):
                rank = _pivoted_rank(tuple(w.shape), ratio)
                stored += pivoted_parameters(tuple(w.shape), rank)
            else:
                stored += rank * sum(w.shape)
            w.copy_(of(w, (layer, role), rank))
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
                w = module_of(model, self.roles, layer, role).weight.data
                rank = rank_at(tuple(w.shape), ratio)
                stored += rank * sum(w.shape)
                w.copy_(svd(w, rank))
        self.add(scope, ratio, "shared-tucker", None, parameters=stored, **self.loss(model))

    def ours(
        self, scope: str, ratio: float, seed: int, text: Calibration, moments: Moments, **more: Any
    ) -> None:
        started = time.perf_counter()
        model = copy.deepcopy(self.dense)
        wanted = SCOPES[scope](target_ratio=ratio, **more)
        report = compress(model, fit(wanted, model, text, moments=None if more else moments))
        seconds = time.perf_counter() - started
        stored = sum(site.parameters_after for site in report.sites)
        name = " ".join(["ours", *(f"{key}={value}" for key, value in more.items())])
        self.add(scope, ratio, name, seed, parameters=stored, seconds=seconds, **self.loss(model))


def _pivoted_rank(shape: tuple[int, int], ratio: float) -> int:
    budget = shape[0] * shape[1] / ratio
    fits = [r for r in range(1, min(shape) + 1) if pivoted_parameters(shape, r) <= budget]
    return fits[-1]


def _mean_abs(bench: Bench, text: Calibration) -> dict[Matrix, torch.Tensor]:
    """ASVD's scale: mean |x| of every input feature."""
    sums: dict[Matrix, torch.Tensor] = {}
    now: dict[str, torch.Tensor] = {}
    handles = []
    for matrix in bench.matrices("whole model"):

        def see(module: nn.Module, args: Any, matrix: Matrix = matrix) -> None:
            sums[matrix] = sums.get(matrix, 0) + args[0][now["mask"]].abs().sum(0)

        module = module_of(bench.dense, bench.roles, *matrix)
        handles.append(module.register_forward_pre_hook(see))
    with torch.no_grad():
        for batch in text.batches():
            now["mask"] = batch.mask_BT
            bench.dense.base_model(batch.ids_BT, attention_mask=batch.mask_BT.long())
    for handle in handles:
        handle.remove()
    return {matrix: total / text.tokens for matrix, total in sums.items()}


def run_seed(bench: Bench, seed: int) -> None:
    text = bench.calibration(seed)
    started = time.perf_counter()
    moments = measure_for(ActivationHybrid(target_ratio=2), bench.dense, text)
    bench.add("whole model", math.nan, "measure", seed, seconds=time.perf_counter() - started)
    scales = _mean_abs(bench, text)
    seen = {(key[0], role): m for key, m in moments.inputs.items() for role in key[1]}
    for scope in SCOPES:
        for ratio in RATIOS:
            bench.per_matrix(scope, ratio, "asvd", seed, lambda w, m, r: asvd(w, scales[m], r))
            for method in ("svd-llm", "svd-llm pivoted"):
                bench.per_matrix(scope, ratio, method, seed, lambda w, m, r: svd_llm(w, seen[m], r))
            bench.ours(scope, ratio, seed, text, moments)
            if seed == 0:
                bench.ours(scope, ratio, seed, text, moments, weighting="outputs")


def summary(bench: Bench, dense: dict[str, float]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds, and the share of the gap that is closed, by seed."""
    rows = [row for row in bench.rows if row["method"] != "measure"]
    by: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        by.setdefault((row["scope"], row["ratio"], row["method"]), []).append(row)
    out = []
    for (scope, ratio, method), some in sorted(by.items()):
        entry: dict[str, Any] = {"scope": scope, "ratio": ratio, "method": method}
        base = {row["seed"]: row for row in by.get((scope, ratio, "svd-llm"), [])}
        for text in bench.texts:
            losses = [row[text] for row in some]
            entry[text] = _spread(losses)
            entry[f"{text} closed"] = _spread(
                [
                    (one[text] - row[text]) / (one[text] - dense[text])
                    for row in some
                    for one in (base.values() if row["seed"] is None else [base[row["seed"]]])
                ]
            )
        out.append(entry)
    return out


def _spread(values: list[float]) -> dict[str, float]:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "sd": spread, "least": min(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, default=os.environ.get("TENSORLLM_SHARED"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("docs/results/whole_model.json"))
    args = parser.parse_args()
    bench = Bench(args.shared or Path("../shared"))
    dense = bench.loss(bench.dense)
    print("dense", dense, flush=True)
    for scope in SCOPES:
        for ratio in RATIOS:
            bench.per_matrix(scope, ratio, "svd", None, lambda w, m, r: svd(w, r))
            bench.shared_tucker(scope, ratio)
    for seed in range(args.seeds):
        run_seed(bench, seed)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "model": MODEL,
            "tokens": {name: sum(map(len, some)) for name, some in bench.texts.items()},
            "dense": dense,
            "seeds": seed + 1,
            "summary": summary(bench, dense),
            "rows": [{k: v for k, v in r.items() if v == v} for r in bench.rows],
            "environment": environment(),
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
