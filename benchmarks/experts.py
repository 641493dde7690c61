"""Experts of a mixture at equal size: one Tucker tensor against an SVD of each matrix.

    python benchmarks/support/train_moe.py FOLDER
    python benchmarks/experts.py --model FOLDER

Only the experts' matrices are compressed. Scored is the text that the model was not trained on, in
nats per token, its four kinds weighing alike; calibrated methods see drawn blocks of the text that
it was trained on. `uniform` keeps the same share of every matrix or tensor, `budget` shares one
budget out over all of them by their error curves. Parts of docs/results/experts.json: `quality`,
and `speed` of a larger layer of experts, dense and in its factors.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from support import train_moe
from support.results import RESULTS, Comparison, begin, parser, save
from torch import nn

from tensorllm.calibration import Calibration
from tensorllm.compression.engine import compress
from tensorllm.compression.factorize import factorize
from tensorllm.compressors import COMPRESSORS
from tensorllm.compressors.budget import Budget
from tensorllm.compressors.settings import make_compressor
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.runtime.measure import interleaved, medians
from tensorllm.tensors.stacking import ROUTED

REMOVED = (0.2, 0.4, 0.6)
LENGTH, SEQUENCES = 128, 128
SCORED = 8192  # tokens of each kind of text
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "svd": ("svd", {"matrices": ROUTED}),
    "expert-tucker": ("expert-tucker", {}),
    "expert-tucker, all stacked": ("expert-tucker", {"stacked": "all"}),
    "expert-tucker, width alone": ("expert-tucker", {"modes": ["width"]}),
    "svd-llm": ("svd-llm", {"matrices": ROUTED}),
    "activation-expert-tucker": ("activation-expert-tucker", {}),
    "activation-expert-tucker, width alone": ("activation-expert-tucker", {"modes": ["width"]}),
}
PAIRS = (("expert-tucker", "svd"), ("activation-expert-tucker", "svd-llm"))
MAIN = {name for pair in PAIRS for name in pair}  # the others are variants


class Bench:
    """The dense model, its texts and the table of results."""

    def __init__(self, folder: Path, shared: Path, quick: bool) -> None:
        from transformers import AutoModelForCausalLM

        self.dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.dense.set_experts_implementation("eager")
        self.told_N, self.held = train_moe.text_of(shared)
        most = 4 * LENGTH if quick else SCORED
        self.held = {kind: ids_N[:most] for kind, ids_N in self.held.items()}
        self.rows: list[dict[str, Any]] = []

    def losses(self, model: nn.Module) -> dict[str, float]:
        """Nats per token of each kind of text, and their mean."""
        found = {k: train_moe.held_out_loss(model, ids, LENGTH) for k, ids in self.held.items()}
        return found | {"mean": mean(found.values())}

    def calibration(self, seed: int) -> Calibration:
        draws = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(self.told_N) - LENGTH, (SEQUENCES,), generator=draws).tolist()
        blocks = [tuple(self.told_N[i : i + LENGTH].tolist()) for i in starts]
        return Calibration(tuple(blocks), source="benchmark", seed=seed)

    def run(self, name: str, removed: float, sizes: str, seed: int | None) -> None:
        """One method at one size on one draw of the text."""
        mode, settings = METHODS[name]
        kind = COMPRESSORS[mode]
        budget = None
        if sizes == "uniform":
            settings = settings | {"kept": 1 - removed}
        else:
            roles = RoleMatrices(self.dense.config, parameters_of(self.dense))
            settings = kind.budget_settings(roles.spec, settings)
            budget = Budget(target_ratio=1 / (1 - removed))
        model = copy.deepcopy(self.dense)
        text = None if seed is None else self.calibration(seed)
        report = compress(model, make_compressor(mode, settings), calibration=text, budget=budget)
        after = sum(site.parameters_after for site in report.sites)
        before = self.numbers(model)
        after += before - sum(site.parameters_before for site in report.sites)
        row = {"method": name, "removed": removed, "sizes": sizes, "seed": seed}
        row |= {"kept": after / before, "seconds": report.seconds, **self.losses(model)}
        self.rows.append(row)
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)

    def numbers(self, model: nn.Module) -> int:
        """In the experts' matrices of all layers."""
        spec = RoleMatrices(self.dense.config, parameters_of(model)).spec
        return sum(
            geometry.numel(role)
            for geometry in spec.geometries
            for family in ROUTED
            for role in geometry.members(family)
        )


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean loss of each method and size over the seeds, and its standard deviation."""
    groups: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["removed"], row["sizes"]), []).append(row)
    return [
        {
            "method": method,
            "removed": removed,
            "sizes": sizes,
            "kept": mean(row["kept"] for row in found),
            "loss": mean(row["mean"] for row in found),
            "deviation": stdev(row["mean"] for row in found) if len(found) > 1 else 0.0,
        }
        for (method, removed, sizes), found in groups.items()
    ]


def comparisons(found: list[dict[str, Any]], dense: float) -> dict[str, Comparison]:
    """What each method loses against the dense model, beside its peer's loss."""
    lost = {(e["method"], e["removed"], e["sizes"]): e["loss"] - dense for e in found}
    return {
        f"{ours} at {removed:.0%} removed, {sizes}": Comparison(
            ours=lost[ours, removed, sizes],
            peer=lost[peer, removed, sizes],
            peer_name=peer,
            unit="nats per token lost",
        )
        for ours, peer in PAIRS
        for removed in REMOVED
        for sizes in ("uniform", "budget")
        if (ours, removed, sizes) in lost and (peer, removed, sizes) in lost
    }


def quality(args: argparse.Namespace) -> None:
    bench = Bench(args.model, args.shared, args.quick)
    dense = bench.losses(bench.dense)
    print("dense", dense, flush=True)
    provenance = json.loads((args.model / "provenance.json").read_text())
    if not args.quick:
        bench.rows += [row for row in recorded(provenance) if row["sizes"] not in args.sizes]
    for sizes in ("uniform",) if args.quick else args.sizes:
        for removed in REMOVED[1:2] if args.quick else REMOVED:
            for name, (mode, _) in METHODS.items():
                if sizes == "budget" and name not in MAIN:
                    continue
                fitted = COMPRESSORS[mode].needs != "weights"
                for seed in args.seeds if fitted else [None]:
                    bench.run(name, removed, sizes, seed)
            found = summary(bench.rows)
            save(
                "experts",
                "quality",
                comparisons(found, dense["mean"]),
                args,
                model=provenance,
                calibration={"sequences": SEQUENCES, "tokens": LENGTH * SEQUENCES},
                tokens={kind: len(ids_N) for kind, ids_N in bench.held.items()},
                dense=dense,
                summary=found,
                rows=bench.rows,
            )


def recorded(provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """What earlier runs have measured on the same model."""
    path = RESULTS / "experts.json"
    part = json.loads(path.read_text()).get("quality", {}) if path.is_file() else {}
    found: list[dict[str, Any]] = part.get("rows", []) if part.get("model") == provenance else []
    return found


def speed(args: argparse.Namespace) -> None:
    """One layer of half the width of Qwen3-30B-A3B and 16 experts, random weights, float32."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    width, experts = (64, 4) if args.quick else (1024, 16)
    config = Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=experts,
        num_experts_per_tok=4,
        moe_intermediate_size=3 * width // 8,
        norm_topk_prob=True,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config).eval()
    shown: dict[str, Comparison] = {}
    rows = []
    for kept in (0.6, 0.4, 0.2):
        ranks = (0, 0, round(kept * width), 0)
        small = copy.deepcopy(model)
        report = compress(small, make_compressor("expert-tucker", {"ranks": ranks}))
        factorize(small)
        stored = sum(s.parameters_after for s in report.sites)
        share = stored / sum(s.parameters_before for s in report.sites)
        for what, tokens in (("prefill", 64 if args.quick else 256), ("decode", 1)):
            x = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(1))
            seconds = medians(interleaved(calls(model, small, x), 3 if args.quick else 9))
            times = {way: 1000 * took for way, took in seconds.items()}
            ours = times.pop("factored")
            best = min(times, key=lambda way: times[way])
            rows.append({"kept": share, "what": what, "tokens": tokens, "factored": ours, **times})
            print(rows[-1], flush=True)
            shown[f"{what}, {share:.0%} of the experts kept"] = Comparison(
                ours=ours, peer=times[best], peer_name=f"dense ({best})", unit="ms"
            )
    save("experts", "speed", shown, args, rows=rows, config=config.to_diff_dict())


def calls(model: Any, small: Any, x_BTD: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The layer of experts, dense by two of transformers' ways and factored."""

    def dense(way: str) -> Callable[[], Any]:
        def run() -> Any:
            model.config._experts_implementation = way
            with torch.no_grad():
                return model.model.layers[0].mlp(x_BTD)

        return run

    def factored() -> Any:
        with torch.no_grad():
            return small.model.layers[0].mlp(x_BTD)

    return {"eager": dense("eager"), "grouped_mm": dense("grouped_mm"), "factored": factored}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", type=Path, help="folder that support/train_moe.py made")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    sizes = ("uniform", "budget")
    options.add_argument("--sizes", nargs="+", choices=sizes, default=sizes)
    options.add_argument("--parts", nargs="+", choices=("quality", "speed"), default=["quality"])
    args = options.parse_args()
    begin(args)
    if args.quick and args.model is None:
        args.parts = ["speed"]  # the other needs a trained model
    if "quality" in args.parts:
        if args.model is None or not (args.model / "provenance.json").is_file():
            sys.exit("give --model FOLDER, made by: python benchmarks/support/train_moe.py FOLDER")
        quality(args)
    if "speed" in args.parts:
        speed(args)


if __name__ == "__main__":
    main()
