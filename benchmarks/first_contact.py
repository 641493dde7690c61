"""The tutorial's second half, command by command: a real model answers better after two edits.

    python scripts/fetch_small_model.py smollm2/
    python benchmarks/first_contact.py --model smollm2/ [--data-file qa_wikidata.jsonl]

Each edit is a part of docs/results/first_contact.json: what `tensorllm compress` did, and what
`tensorllm evaluate` says of the model before and after, on the first `--limit` test questions of
wikidata_qa, from the hub or a file. The edits were chosen on others (docs/does_it_work.md). What
they do elsewhere: `--others fever=FILE text=FILE`, any datasets, each from a local file.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from support.results import Comparison, begin, parser, save

EDITS = {
    "laser": "--mode laser --layers 28 --matrices in --rho 0.2",
    "hybrid": "--mode hybrid --layers 16 --ranks 288,16,7 --matrices gate --rho 0.6",
    # which half of it does what
    "attention of the hybrid": "--mode shared-tucker --layers 16 --ranks 288,16,7",
    "FFN of the hybrid": "--mode laser --layers 16 --matrices gate --rho 0.6",
}
MOST = {"text": 4}  # blocks of 1,024 tokens
QUICK = {"laser": "--mode laser --layers 3 --matrices in --rho 0.01"}


def command(name: str, *options: object) -> tuple[dict[str, Any], float]:
    """What `tensorllm NAME ... --json` says, and how many seconds it takes."""
    line = [sys.executable, "-m", "tensorllm", name, *map(str, options), "--json"]
    started = time.perf_counter()
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found, time.perf_counter() - started


def measured(edit: str, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One edit of the model, and its questions before and after."""
    report, compressing = command(
        "compress", "--model", args.model, *edit.split(), "--format", "factored", "--out", out
    )
    scores, evaluating = scored("demo" if args.quick else "wikidata_qa", args.data_file, out, args)
    others = (one.split("=", 1) for one in args.others)
    return {
        "edit": edit,
        "report": report,
        "scores": scores,
        "others": {name: scored(name, file, out, args)[0] for name, file in others},
        "seconds": {"compress": compressing, "evaluate": evaluating},
    }


def scored(
    dataset: str, file: Path | str | None, out: Path, args: argparse.Namespace
) -> tuple[dict[str, Any], float]:
    """The model before and after on one dataset, and how long that took."""
    asked = ["--dataset", dataset, "--limit", min(args.limit, MOST.get(dataset, args.limit))]
    asked += ["--data-file", file] if file else []
    found, seconds = command("evaluate", "--model", args.model, *asked, "--compressed", out)
    kept = ("metrics", "intervals", "before", "comparison", "examples", "protocol", "seed", "dtype")
    return {name: found[name] for name in kept if name in found}, seconds


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", type=Path, help="folder of scripts/fetch_small_model.py")
    options.add_argument("--data-file", type=Path, help="rows of wikidata_qa, in place of the hub")
    options.add_argument("--others", nargs="*", default=[], metavar="DATASET=FILE")
    options.add_argument("--edits", nargs="+", choices=EDITS, default=list(EDITS))
    options.add_argument("--limit", type=int, default=300, help="questions")
    args = options.parse_args()
    if args.quick:
        args.model, args.limit = "demo", 8
    elif args.model is None:
        sys.exit("give --model FOLDER")
    begin(args)
    for name, edit in (QUICK if args.quick else {name: EDITS[name] for name in args.edits}).items():
        with tempfile.TemporaryDirectory() as scratch:
            found = measured(edit, Path(scratch) / "small", args)
        scores = found["scores"]
        shown = Comparison(
            ours=scores["metrics"]["accuracy"],
            unit="%",
            peer=scores["before"]["metrics"]["accuracy"],
            peer_name="original",
            more_is_better=True,
        )
        save("first_contact", name, {f"accuracy, {name}": shown}, args, **found)


if __name__ == "__main__":
    main()
