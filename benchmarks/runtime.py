"""Speed and bytes of factored layers, beside dense ones in the same run.

    python benchmarks/runtime.py                 # all parts, docs/results/runtime.json
    python benchmarks/runtime.py --part block    # one attention block of GPT-J's size
    python benchmarks/runtime.py --part whole    # a 12-layer model, end to end
    python benchmarks/runtime.py --part cost     # the cost model of --policy auto, held to times

Times are taken in turns, one side after the other. The part `whole` also measures tltorch's
factorised linears where tensorly-torch is installed; else their column is left out.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from attention_block import WANTED, block, gptj
from cost_model import KINDS, costs, too_high
from tltorch_model import (
    IMPLEMENTATIONS,
    NEW,
    PROMPT,
    attention_parameters,
    installed,
    peak_of,
    tltorch_model,
)
from transformers import GPTJForCausalLM

import tensorllm as tl
from tensorllm.environment import environment
from tensorllm.pipeline.bench import BenchRequest, bench
from tensorllm.pipeline.measure import measure
from tensorllm.runtime.cost import MARGIN

ROOT = Path(__file__).parents[1]


def whole(repeats: int) -> dict[str, Any]:
    """A 12-layer model, from its folder: end to end, dense beside factored and beside tltorch."""
    torch.manual_seed(0)
    model = GPTJForCausalLM(gptj(1024, 12, 16)).eval()
    ranks = (256, 16, 4)
    with tempfile.TemporaryDirectory() as folder:
        tl.compress(model, tl.SharedTucker4D(ranks=ranks, sweeps=0))
        tl.save(model, Path(folder) / "out")
        request = BenchRequest(
            model=Path(folder) / "out", prompt_tokens=PROMPT, new_tokens=NEW, repeats=repeats
        )
        found = bench(request).to_json()
    del found["environment"], found["sites"]
    return {"ranks": ranks, **found, "beside_tltorch": beside_tltorch(model, repeats)}


def beside_tltorch(model: Any, repeats: int) -> dict[str, Any] | str:
    """Ours beside tltorch's linears with as many parameters, both its ways of running them."""
    if not installed():
        return "not installed (pip install tensorly-torch)"
    tl.factorize(model)
    ours = attention_parameters(model)
    theirs = {f"tltorch, {how}": tltorch_model(ours, how) for how in IMPLEMENTATIONS}
    models = {"factored": model, **theirs}
    found = measure(models, PROMPT, NEW, repeats)
    peaks = {f"tltorch, {how}": peak_of(ours, how) for how in IMPLEMENTATIONS}
    return {
        "attention_parameters": {n: attention_parameters(m) for n, m in models.items()},
        "models": {n: replace(m, peak_bytes=peaks.get(n)).to_json() for n, m in found.items()},
    }


def print_block(row: dict[str, Any]) -> None:
    for what in ("prefill_512", "decode_1024"):
        one = row[what]
        ratios = ", ".join(f"{kind} {ratio:.2f}x" for kind, ratio in one["speedup"].items())
        print(f"{row['ranks']} {what}: {ratios} (wanted {one['wanted']}x; {one['quiet_turns']})")
    above = {n: f"{times:.2f}" for n, times in row["decode_1024"]["times_the_floor"].items()}
    print(f"{row['ranks']} decode, times the time of reading weights and cache once: {above}")


def print_cost(row: dict[str, Any]) -> None:
    both = (f"{k} {row[k]['predicted']:.2f} {row[k]['measured']:.2f}" for k in KINDS)
    print(row["site"], row["width"], row["ranks"], "predicted, measured:", ", ".join(both))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("block", "whole", "cost", "all"), default="all")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--note", default="", help="kept with the figures, such as how busy it was")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "runtime.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {}
    about = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(),
        "threads": args.threads,
        "load": os.getloadavg(),
        "note": args.note,
    }
    if args.part in ("block", "all"):
        rows = [block(ranks, args.repeats) for ranks in WANTED]
        found[f"block, {args.threads} threads"] = about | {"rows": rows}
        for row in rows:
            print_block(row)
    if args.part in ("whole", "all"):
        row = whole(max(3, args.repeats // 3))
        found["whole"] = about | {**row}
        print(json.dumps(row, indent=2))
    if args.part in ("cost", "all"):
        rows = costs(max(3, args.repeats // 3))
        high = {"predicted_too_high_by": too_high(rows), "margin": MARGIN}
        found["cost model"] = about | {**high, "rows": rows}
        for row in rows:
            print_cost(row)
        print(f"predicted too high by at most {high['predicted_too_high_by']:.2f}, near 1")
    print(f"{time.perf_counter() - started:.0f} s")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
