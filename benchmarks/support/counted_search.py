"""`python benchmarks/support/counted_search.py search-ranks ...`: a search as the command line has
it, which ends after its trials and prints what they took and found as a line of JSON.

Runs in any environment with a release of tensorllm, older ones too, and so imports nothing else.
"""

import json
import sys
import time

import torch
from tensorllm.search.worker import Worker
from tensorllm_cli.app import main


def counted(run):  # type: ignore[no-untyped-def]  # older releases have other types
    def search(self, report=None):  # type: ignore[no-untyped-def]
        before = time.process_time()
        started = time.perf_counter()
        run(self, report)
        trials = [
            {"params": trial.params, **trial.user_attrs.get("result", {})}
            for trial in self.queue.trials()
        ]
        found = {
            "cpu_seconds": time.process_time() - before,
            "seconds": time.perf_counter() - started,
            "cpu_seconds_before": before,
            "threads": torch.get_num_threads(),
            "original": self.queue.study.user_attrs["original"],
            "trials": trials,
        }
        print(json.dumps(found), flush=True)
        sys.exit(0)  # test parts are of no interest here

    return search


if __name__ == "__main__":
    Worker.run = counted(Worker.run)  # type: ignore[method-assign]
    main()
