"""Time and memory of a whole model's fit beside SVD-LLM's, each in a fresh process.

    python benchmarks/whole_model_cost.py --shared SHARED

Attention and FFN at ratio 2, on the two models and texts of whole_model.py. Measuring is what is
seen and felt (ours) or seen (SVD-LLM) on the calibration text, for all layers; fitting is all that
follows up to a model with other weights. Memory is the peak of the process's resident bytes from
then on, above what it held with the model and the text loaded: moments, activations, gradients and
the second model. Streamed, ours holds one layer at a time and does measuring and fitting in one.
SVD-LLM is the mode `svd-llm`: one pass forward, a Cholesky factor and an SVD per matrix.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.results import Comparison, begin, parser, save
from whole_model import MODELS, Bench

from tensorllm.calibration import Calibration, fit, fit_folder
from tensorllm.calibration.fit import measure_for
from tensorllm.compression.engine import compress
from tensorllm.compression.publish import peak_resident_bytes
from tensorllm.compressors import SVDLLM, ActivationHybrid

METHODS = ("svd-llm", "ours", "ours, streamed")


class Meter:
    """Seconds and peak bytes of the steps of this process."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}
        self._before = self._resident()

    def step(self, name: str, call: Callable[[], Any]) -> Any:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: man 5 proc
        started = time.perf_counter()
        out = call()
        seconds = time.perf_counter() - started
        self.found[name] = {"seconds": seconds, "bytes": peak_resident_bytes() - self._before}
        return out

    @staticmethod
    def _resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peer(model: Any, text: Calibration, meter: Meter) -> None:
    """SVD-LLM on every matrix: measured and decomposed layer by layer."""
    meter.step("fitting", lambda: fit(SVDLLM(kept=0.5), model, text))


def ours(wanted: ActivationHybrid, model: Any, text: Calibration, meter: Meter) -> None:
    known = meter.step("measuring", lambda: measure_for(wanted, model, text))
    smaller = copy.deepcopy(model)
    meter.step("fitting", lambda: compress(smaller, fit(wanted, model, text, covariances=known)))


def child(args: argparse.Namespace) -> None:
    """One method on one model; what it took as JSON."""
    name, method = args.child
    bench = Bench(name, args.shared, args.quick)
    model, text = bench.dense, bench.calibration(0)
    wanted = ActivationHybrid(target_ratio=2, **({"refit_epochs": 1} if args.quick else {}))
    if method == METHODS[0]:
        peer(model, text, meter := Meter())
    elif method == METHODS[1]:
        ours(wanted, model, text, meter := Meter())
    else:
        with tempfile.TemporaryDirectory() as folder:
            source, work = Path(folder, "model"), Path(folder, "work")
            model.save_pretrained(source)
            del model, bench
            meter = Meter()
            meter.step("streamed", lambda: fit_folder(wanted, source, text, work=work))
    print(json.dumps(meter.found))


def measured(name: str, method: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The same from a process of its own."""
    options = ["--child", name, method, "--shared", str(args.shared)]
    options += ["--threads", str(torch.get_num_threads()), *(["--quick"] if args.quick else [])]
    run = subprocess.run(
        [sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, dict[str, float]] = json.loads(run.stdout.splitlines()[-1])
    return found


def compared(found: dict[str, dict[str, dict[str, float]]]) -> dict[str, Comparison]:
    """Measuring and fitting of ours beside SVD-LLM's, which does both in one."""
    theirs, mine, streamed = (found[method] for method in METHODS)
    out = {}
    for what, field, unit in (("time", "seconds", "s"), ("memory", "bytes", "bytes")):
        steps = [mine[step][field] for step in ("measuring", "fitting")]
        whole, peer = sum(steps) if unit == "s" else max(steps), theirs["fitting"][field]
        pairs = {"both": (whole, peer), "both, streamed": (streamed["streamed"][field], peer)}
        for step, (a, b) in pairs.items():
            out[f"{what} of {step}"] = Comparison(ours=a, unit=unit, peer=b, peer_name="SVD-LLM")
    return out


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    options.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = options.parse_args()
    begin(args)
    if args.child:
        child(args)
        return
    for name in ["demo"] if args.quick else args.models:
        found = {method: measured(name, method, args) for method in METHODS}
        save("whole_model_cost", name, compared(found), args, steps=found)


if __name__ == "__main__":
    main()
