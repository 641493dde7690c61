"""`python benchmarks/support/counted_search.py search-ranks ...`: a search as the command line has
it, which ends after its trials and prints what they took and found as a line of JSON.

With `--flops` before `search-ranks` also the floating-point operations of all its matrix products,
which takes longer: its times are then of no use.

Runs in any environment with a release of tensorllm, older ones too, and so imports nothing else of
this folder.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.utils.flop_counter import FlopCounterMode

import tensorllm
from tensorllm.search.worker import Worker
from tensorllm_cli.app import main


def counted(run: Any, results: TextIO, *, flops: bool) -> Any:
    """`Worker.run`, after which the process ends: the test part is of no interest here.

    Args:
        results: standard output, which the command itself turns to standard error meanwhile.
    """
    operations = FlopCounterMode(display=False) if flops else nullcontext()

    def search(self: Any, report: Any = None) -> None:
        before, started = time.process_time(), time.perf_counter()
        with operations:
            run(self, report)
        found = {
            "arguments": sys.argv[1:],
            "release": release(),
            "cpu_seconds": time.process_time() - before,
            "seconds": time.perf_counter() - started,
            "cpu_seconds_before": before,
            "threads": torch.get_num_threads(),
            "original": self.queue.study.user_attrs["original"],
            "trials": [
                {"params": trial.params, **trial.user_attrs.get("result", {})}
                for trial in self.queue.trials()
            ],
        }
        if isinstance(operations, FlopCounterMode):
            found["flops"] = operations.get_total_flops()
        print(json.dumps(found), file=results, flush=True)
        sys.exit(0)

    return search


def release() -> str:
    """The commit that tensorllm is imported from, else its version."""
    git = ["git", "-C", str(Path(tensorllm.__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return tensorllm.__version__


if __name__ == "__main__":
    flops = "--flops" in sys.argv
    if flops:
        sys.argv.remove("--flops")
    Worker.run = counted(Worker.run, os.fdopen(os.dup(1), "w"), flops=flops)  # type: ignore[method-assign]
    main()
