"""How each cost grows: with width, heads, layers, examples, trials, workers, tokens and bytes.

    python benchmarks/scaling.py --part decompose      # one part, minutes
    python benchmarks/scaling.py                       # all

Each curve is timed at some sizes and fitted by a power law; scripts/make_scaling_figures.py draws
them, and docs/scaling.md computes from them what a model of 405 billion parameters would take.
"""

import json
from collections.abc import Callable
from typing import Any

from support.results import begin, parser, save
from support.scaling_models import calibrate, compress, evaluate, files, search
from support.scaling_runtime import runtime
from support.scaling_tensors import decompose, eigenvectors, machine

PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "machine": machine,
    "decompose": decompose,
    "eigenvectors": eigenvectors,
    "compress": compress,
    "evaluate": evaluate,
    "search": search,
    "calibrate": calibrate,
    "runtime": runtime,
    "files": files,
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--part", choices=PARTS, action="append", help="all by default")
    args = options.parse_args()
    begin(args)
    for part in args.part or PARTS:
        print(f"-- {part}", flush=True)
        found = PARTS[part](args.quick)
        for name, one in found.items():
            print(name, json.dumps(one), flush=True)
        save("scaling", part, {}, args, curves=found)


if __name__ == "__main__":
    main()
