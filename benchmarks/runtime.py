"""Speed and bytes of factored layers, beside dense ones in the same run.

    python benchmarks/runtime.py                 # all parts, docs/results/runtime.json
    python benchmarks/runtime.py --part block    # one attention block of GPT-J's size
    python benchmarks/runtime.py --part whole    # a 12-layer model, end to end
    python benchmarks/runtime.py --part cost     # the cost model of --policy auto, held to times
    python benchmarks/runtime.py --part cache    # --cache auto beside latents and wide values
    python benchmarks/runtime.py --part real --model smollm2/ --hybrid compressed/
                                                 # a real model: speed, memory, what was predicted
    python benchmarks/runtime.py --part token --model smollm2/ --hybrid compressed/
                                                 # where the time of one decoded token goes
    python benchmarks/runtime.py --part compile --model smollm2/ --hybrid compressed/
                                                 # its first layers compiled by torch.compile

Times are taken in turns, one side after the other. The part `whole` also measures tltorch's
factorised linears where tensorly-torch is installed; else their column is left out.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from support.attention_block import WANTED, block, gptj
from support.caches import caches
from support.caches import compared as of_caches
from support.compiled import compared as of_compiled
from support.compiled import compiled
from support.cost_model import KINDS, costs, least_gain
from support.real_runtime import DTYPES, MADE
from support.real_runtime import compared as of_real
from support.real_runtime import real as real_rows
from support.results import Comparison, begin, parser, save
from support.tltorch_model import (
    IMPLEMENTATIONS,
    NEW,
    PROMPT,
    attention_parameters,
    installed,
    peak_of,
    tltorch_model,
)
from support.token_parts import token_parts
from transformers import GPTJForCausalLM

import tensorllm as tl
from tensorllm.commands.bench import bench
from tensorllm.requests.others import BenchRequest
from tensorllm.runtime import SiteModule
from tensorllm.runtime.cost import Policy
from tensorllm.runtime.measure import measure

PARTS = ("block", "whole", "cost", "cache", "real", "token", "compile", "all")


def whole(repeats: int, quick: bool) -> dict[str, Any]:
    """A 12-layer model, from its folder: end to end, dense beside factored and beside tltorch."""
    torch.manual_seed(0)
    model = GPTJForCausalLM(gptj(64, 2, 4) if quick else gptj(1024, 12, 16)).eval()
    ranks = (16, 4, 4) if quick else (256, 16, 4)
    with tempfile.TemporaryDirectory() as folder:
        tl.compress(model, tl.SharedTucker4D(ranks=ranks, sweeps=0))
        tl.save(model, Path(folder) / "out")
        request = BenchRequest(
            model=Path(folder) / "out", prompt_tokens=PROMPT, new_tokens=NEW, repeats=repeats,
            peak=not quick,
        )  # fmt: skip
        found = bench(request).to_json()
    del found["environment"], found["sites"]
    beside = "not with --quick" if quick else beside_tltorch(model, repeats)
    return {"ranks": ranks, **found, "beside_tltorch": beside}


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


def of_block(row: dict[str, Any]) -> dict[str, Comparison]:
    """Times of a block, and the bytes that it reads and keeps."""
    out = {}
    for what in ("prefill_512", "decode_1024"):
        one, name = row[what], f"{what.replace('_', ' of ')}, ranks {row['ranks']}"
        seconds = one["seconds"]["quiet_median"]
        out[name] = Comparison(
            ours=seconds["factored"], unit="s", peer=seconds["dense"], peer_name="dense",
            wanted=one["wanted"], floor=one.get("floor_seconds", {}).get("factored"),
        )  # fmt: skip
    for what, ours in (("weights", row["weight_bytes"]), ("values", row["key_and_value_bytes"])):
        small, large = (x if what == "weights" else x[1] for x in (ours["factored"], ours["dense"]))
        out[f"{what}, ranks {row['ranks']}"] = Comparison(
            ours=small, unit="bytes", peer=large, peer_name="dense"
        )
    return out


def of_whole(row: dict[str, Any]) -> dict[str, Comparison]:
    """A whole model beside the dense one, and beside tltorch's where that is installed."""
    beside = row["beside_tltorch"]
    pairs = [(row["models"]["factored"], {"dense": row["models"]["dense"]})]
    if not isinstance(beside, str):
        pairs.append((beside["models"]["factored"], beside["models"]))
    out = {}
    for ours, peers in pairs:
        for peer, theirs in peers.items():
            for field in ("prefill_tokens_per_second", "decode_tokens_per_second", "peak_bytes"):
                if peer != "factored" and ours[field] and theirs[field]:
                    out[f"{field.partition('_')[0]}, beside {peer}"] = Comparison(
                        ours=ours[field], peer=theirs[field], peer_name=peer,
                        unit="bytes" if field == "peak_bytes" else "tokens/s",
                        more_is_better=field != "peak_bytes",
                    )  # fmt: skip
    return out


def print_cost(row: dict[str, Any]) -> None:
    both = (f"{k} {row[k]['predicted']:.2f} {row[k]['measured']:.2f}" for k in KINDS)
    print(row["site"], row["width"], row["ranks"], "predicted, measured:", ", ".join(both))


def arguments() -> argparse.Namespace:
    """What is to be measured."""
    options, policies = parser(__doc__), list(get_args(Policy))
    options.add_argument("--part", choices=PARTS, default="all")
    options.add_argument("--repeats", type=int, default=15)
    options.add_argument("--note", default="", help="kept with the figures: how busy it was")
    more = options.add_argument_group("--part real, --part token, --part compile")
    more.add_argument(
        "--model", type=Path, help="folder of a dense model; without it: not measured"
    )
    more.add_argument(
        "--hybrid", type=Path, metavar="OUT",
        help="tensorllm compress --mode activation-hybrid --format factored --target-ratio R1,R2",
    )  # fmt: skip
    more.add_argument("--ratios", type=float, nargs="+", default=[1.25, 1.5, 2.0])
    more.add_argument("--methods", nargs="*", choices=tuple(MADE), default=list(MADE))
    more.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    more.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    more.add_argument("--prompt", type=int, default=PROMPT)
    more.add_argument("--new", type=int, default=NEW)
    more.add_argument("--label", default="", help="of --part real: added to the part's name")
    more.add_argument(
        "--own-cache", action="store_true", help="also the dense model with a cache as ours grows"
    )
    more.add_argument("--layers", type=int, default=4, help="of --part compile: the first ones")
    more.add_argument("--policies", nargs="+", choices=policies, default=policies)
    more.add_argument(
        "--peaks", nargs="*", choices=tuple(DTYPES), default=list(DTYPES),
        help="dtypes in which the memory of each is measured, in a process of its own",
    )  # fmt: skip
    args = options.parse_args()
    if args.part in ("real", "token", "compile") and args.model is None:
        options.error(f"--part {args.part} needs --model FOLDER")
    if args.part in ("token", "compile") and args.hybrid is None:
        options.error(f"--part {args.part} needs --hybrid OUT")
    return args


def main() -> None:
    args = arguments()
    begin(args)
    repeats, fewer = (1, 1) if args.quick else (args.repeats, max(2, args.repeats // 3))
    if args.part in ("block", "all"):
        small = [block((32, 8, 2), repeats, width=256, heads=4)] if args.quick else []
        rows = small or [block(ranks, repeats) for ranks in WANTED]
        compared = {name: one for row in rows for name, one in of_block(row).items()}
        name = f"block, {torch.get_num_threads()} threads"
        save("runtime", name, compared, args, note=args.note, rows=rows)
    if args.part in ("whole", "all"):
        row = whole(fewer, args.quick)
        save("runtime", "whole", of_whole(row), args, note=args.note, **row)
    if args.part in ("cost", "all"):
        rows = costs(fewer, widest=256 if args.quick else 4096)
        least = least_gain(rows)
        for row in rows:
            print_cost(row)
        print(f"the least gain of what auto runs factored: {least}")
        about = {"note": args.note, "margin": SiteModule.margin, "least_gain_of_auto": least}
        save("runtime", "cost model", {}, args, **about, rows=rows)
    if args.part in ("cache", "all"):
        found = caches(fewer, args.quick)
        save("runtime", "cache", of_caches(found), args, note=args.note, rows=found)
    if args.part == "token":
        rows = list(token_parts(args, 4 * repeats))
        name = f"{args.model.name}, one token, {torch.get_num_threads()} threads"
        save("runtime", name, {}, args, note=args.note, rows=rows)
    if args.part == "compile":  # not of `all`: it takes long
        done = []
        for row in compiled(args, fewer):
            done.append(row)
            name = f"{args.model.name} compiled, {torch.get_num_threads()} threads"
            save("runtime", name, of_compiled(done), args, note=args.note, rows=done)
    if args.part in ("real", "all") and args.model is not None:
        rows: dict[int, list[dict[str, Any]]] = {batch: [] for batch in args.batches}
        for row in real_rows(args, fewer):
            batch = row["batch"]
            rows[batch].append(row)  # an end before the last costs only what comes after
            name = f"{args.model.name}, batch {batch}, {torch.get_num_threads()} threads"
            name += args.label and f", {args.label}"
            save("runtime", name, of_real(rows[batch]), args, note=args.note, rows=rows[batch])


if __name__ == "__main__":
    main()
