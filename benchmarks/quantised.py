"""Perplexity of tinystories-656K at equal bytes: quantised weights beside quantised factors.

    python benchmarks/quantised.py                      # docs/results/quantised.json

Bytes and errors are of the attention and FFN matrices, which all are compressed. Dense weights and
factors are rounded by the same rule (groups of 64, symmetric, to nearest). Factors are fitted to
stories that are not among those the perplexity is of.
"""

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from support.results import Comparison, begin, parser, real, save
from transformers import AutoModelForCausalLM, AutoTokenizer

import tensorllm as tl
from tensorllm.calibration import Calibration, fit
from tensorllm.calibration.smallest import next_token_loss
from tensorllm.compression.engine import compression_of
from tensorllm.compressors import ActivationHybrid
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.tensors.quantised import BITS, dequantise, quantise, quantise_tensor
from tensorllm.tensors.stacking import ATTENTION

MODEL, STORIES = "models/tinystories-656K", "data/tinystories_1000.json"
ROLES = (*ATTENTION, "in", "gate", "out")
RATIOS = (1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)


class Bench:
    """The model, the stories, and what one setting makes of them."""

    def __init__(self, folder: Path, texts: Path, fitted: int, scored: int) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        stories = json.loads(texts.read_text())
        rows = tuple(tuple(self.tokens(s)) for s in stories[-scored:])
        self.scored = Calibration(rows).batches()
        rows = tuple(tuple(self.tokens(s)) for s in stories[:fitted])
        self.text = Calibration(rows, source="tinystories", seed=0)
        self.weights = sum(p.numel() for p in self.matrices(self.model))

    def tokens(self, story: str) -> list[int]:
        return list(self.tokenizer(story, truncation=True, max_length=256).input_ids)

    def matrices(self, model: Any) -> list[torch.Tensor]:
        """Views of every attention and FFN matrix."""
        weights = parameters_of(model)
        roles = RoleMatrices(model.config, weights)
        layers = range(model.config.num_hidden_layers)
        return [roles.read(weights, layer, role) for layer in layers for role in ROLES]

    @torch.inference_mode()
    def perplexity(self, model: Any) -> float:
        return math.exp(next_token_loss(model, self.scored))

    def dense(self, how: str | None) -> dict[str, Any]:
        """All weights in full, or rounded."""
        model, size, lost, energy = copy.deepcopy(self.model), 0, 0.0, 0.0
        weights = parameters_of(model)
        roles = RoleMatrices(model.config, weights)
        for layer in range(model.config.num_hidden_layers):
            for role in ROLES:
                w_ID = roles.read(weights, layer, role)
                parts = quantise_tensor(w_ID.mT, BITS[how]) if how else (w_ID.mT,)
                rounded = (dequantise(*parts) if how else w_ID.mT).mT
                size += sum(p.nbytes for p in parts)
                lost += float((rounded - w_ID).square().sum())
                energy += float(w_ID.square().sum())
                roles.write(weights, layer, role, rounded)
        return self.row("dense", how, size, math.sqrt(lost / energy), model)

    def factored(self, ratio: float, hows: tuple[str | None, ...]) -> list[dict[str, Any]]:
        """Fitted factors of `ratio` times fewer numbers, in float32 and rounded."""
        model = copy.deepcopy(self.model)
        tl.compress(model, fit(ActivationHybrid(target_ratio=ratio), self.model, self.text))
        compression = compression_of(model)
        assert compression is not None, "compressed just now"
        rows = []
        for how in hows:
            size, lost, energy = 0, 0.0, 0.0
            weights = parameters_of(model)
            roles = RoleMatrices(model.config, weights)
            for done in compression.sites:
                factors = quantise(done.factors, how) if how else done.factors
                size += sum(t.nbytes for t in factors.tensors().values())
                exact, rounded = done.factors.dense(), factors.dense()
                lost += float((rounded - exact).square().sum())
                energy += float(exact.square().sum())
                back = done.site.unstack(rounded, roles.spec.geometry(0))
                for (layer, role), w_ID in zip(done.site.matrices, back, strict=True):
                    roles.write(weights, layer, role, w_ID)
            error = math.sqrt(lost / energy)
            rows.append(self.row(f"factors, ratio {ratio}", how, size, error, model))
        return rows

    def row(
        self, what: str, how: str | None, size: int, error: float, model: Any
    ) -> dict[str, Any]:
        return {
            "what": what,
            "numbers": how or "float32",
            "bytes": size,
            "bits_per_weight": 8 * size / self.weights,
            "error_of_rounding": error,
            "perplexity": self.perplexity(model),
        }


def comparisons(rows: dict[str, dict[str, Any]]) -> dict[str, Comparison]:
    """Rounded dense weights beside the best factors that take no more bytes."""
    out = {}
    for how in BITS:
        dense = rows[f"dense, {how}"]
        fit_in = {
            n: r for n, r in rows.items() if n[:5] != "dense" and r["bytes"] <= dense["bytes"]
        }
        if fit_in:
            name = min(fit_in, key=lambda n: fit_in[n]["perplexity"])
            out[f"{name}, in {dense['bits_per_weight']:g} bits per weight"] = Comparison(
                ours=fit_in[name]["perplexity"],
                unit="perplexity",
                peer=dense["perplexity"],
                peer_name=f"dense {how}",
            )
    return out


def rounding_costs(rows: dict[str, dict[str, Any]], how: str, below: float) -> float:
    """The most perplexity that rounding adds to factors of ratios below `below`."""
    return max(
        rows[f"factors, ratio {ratio}, {how}"]["perplexity"]
        - rows[f"factors, ratio {ratio}, float32"]["perplexity"]
        for ratio in RATIOS
        if ratio < below and f"factors, ratio {ratio}, {how}" in rows
    )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--fitted", type=int, default=300, help="stories for the factors")
    options.add_argument("--scored", type=int, default=200, help="stories for the perplexity")
    args = options.parse_args()
    begin(args)
    if args.quick:
        args.fitted, args.scored = 8, 8
    try:
        quantise_tensor(torch.zeros(64, 16), 8)
    except UserError as error:  # torchao is not installed
        sys.exit(str(error))
    bench = Bench(real(args, MODEL), real(args, STORIES), args.fitted, args.scored)
    found = [bench.dense(how) for how in (None, *BITS)]
    for ratio in RATIOS[2:3] if args.quick else RATIOS:
        found += bench.factored(ratio, (None, *BITS))
    for row in sorted(found, key=lambda r: -r["bytes"]):
        print(
            f"{row['what']:22} {row['numbers']:8} {row['bytes']:8} bytes "
            f"{row['bits_per_weight']:6.2f} bits per weight, "
            f"rounding {row['error_of_rounding']:.4f}, "
            f"perplexity {row['perplexity']:.3f}"
        )
    rows = {f"{row['what']}, {row['numbers']}": row for row in found}
    about = {"stories_fitted": args.fitted, "stories_scored": args.scored}
    about["int8_adds_below_ratio_2"] = rounding_costs(rows, "int8", 2.0)
    save("quantised", "tinystories-656K", comparisons(rows), args, **about, rows=rows)


if __name__ == "__main__":
    main()
