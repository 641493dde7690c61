"""A fit of a checkpoint that is read a layer at a time: memory, time, and going on after a kill.

    python benchmarks/streaming.py --layers 100 --width 768

A random GPT-J in bfloat16 (scripts/make_random_checkpoint.py), every layer's attention fitted to
random tokens at ratio 2 and written in factors, as `tensorllm compress --stream` does it, twice in
fresh processes: undisturbed, and killed (SIGKILL) after half of that time, then started again. The
factors of both must be the same to the byte. Memory is the peak of the process's resident bytes;
beside it the checkpoint's bytes, and what the code's own arrays come to while it fits: the imported
libraries, embeddings, one layer and its copy, that layer's moments, and three more of the largest.
Writing holds a shard (`SHARD_BYTES`) too.
"""

import argparse
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from support.results import ROOT, Comparison, begin, parser, save

from tensorllm.calibration import Calibration, fit_folder
from tensorllm.compression.engine import compress_folder
from tensorllm.compression.publish import peak_resident_bytes
from tensorllm.compression.task import FolderTask
from tensorllm.compressors import ActivationTucker

VOCABULARY, DOUBLE, HALF = 50400, 8, 2  # words of GPT-J; bytes of float64 and bfloat16


def child(folder: Path, tokens: int, refit_epochs: int) -> None:
    """The whole way from the checkpoint to the folder in factors."""
    from transformers import GPTJModel  # as the fit will, so that the base has it

    assert GPTJModel
    base, started = peak_resident_bytes(), time.perf_counter()
    drawn = torch.randint(VOCABULARY, (tokens // 256, 256), generator=torch.Generator())
    text = Calibration(tuple(map(tuple, drawn.tolist())), source="random")
    source, target = folder / "model", folder / "small"
    wanted = ActivationTucker(target_ratio=2, refit_epochs=refit_epochs)
    fitted = fit_folder(wanted, source, text, work=folder / "work")
    middle, fitting = time.perf_counter(), peak_resident_bytes()
    compress_folder(FolderTask(source=source, target=target, compressor=fitted, format="factored"))
    took = {"fitting": middle - started, "writing": time.perf_counter() - middle}
    peaks = {"base_bytes": base, "fitting_bytes": fitting, "peak_bytes": peak_resident_bytes()}
    print(json.dumps(peaks | {"seconds": took}))


def started(folder: Path, args: argparse.Namespace) -> subprocess.Popen[str]:
    options = ["--child", str(folder), "--tokens", str(args.tokens)]
    options += ["--refit-epochs", str(args.refit_epochs), "--threads", str(torch.get_num_threads())]
    command = [sys.executable, __file__, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finished(running: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = running.communicate()
    if running.returncode:
        sys.exit(f"the fit ended with exit code {running.returncode}")
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def digests(folder: Path) -> dict[str, str]:
    """Every weight file's SHA-256."""
    files = sorted((folder / "small").glob("*.safetensors"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def formula(width: int) -> int:
    """Bytes of what is held at the same time, without what was imported."""
    layer, embeddings = 12 * width**2, VOCABULARY * width  # q, k, v, o and an FFN 4 times as wide
    moments = width**2 + (3 * width) ** 2 + 2 * width**2  # what q, k, v read and feel; o
    working = 3 * (3 * width) ** 2
    return HALF * (2 * layer + embeddings) + DOUBLE * (moments + working)


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The undisturbed way, and how large the checkpoint is."""
    script = ROOT / "scripts" / "make_random_checkpoint.py"
    sizes = ["--layers", str(args.layers), "--width", str(args.width)]
    heads = ["--heads", str(args.width // 64)]
    folder.mkdir()
    subprocess.run([sys.executable, script, folder / "model", *sizes, *heads], check=True)
    stored = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
    found = finished(started(folder, args))
    return found | {
        "checkpoint_bytes": stored,
        "formula_bytes": found["base_bytes"] + formula(args.width),
        "layers": args.layers,
        "width": args.width,
        "tokens": args.tokens,
        "refit_epochs": args.refit_epochs,
    }


def killed(whole: Path, folder: Path, seconds: float, args: argparse.Namespace) -> dict[str, Any]:
    """The same checkpoint, killed after some seconds and started again."""
    folder.mkdir()
    (folder / "model").symlink_to(whole / "model")
    running = started(folder, args)
    time.sleep(seconds)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    kept = len(list((folder / "work").glob("[ef]*-*.safetensors")))
    again = finished(started(folder, args))
    if digests(whole) != digests(folder):
        sys.exit("a killed and resumed fit gave other factors")
    return {"after": seconds, "layers kept": kept, "then": again}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=100)
    options.add_argument("--width", type=int, default=768)
    options.add_argument("--tokens", type=int, default=1024)
    options.add_argument("--refit-epochs", type=int, default=1)
    options.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = options.parse_args()
    begin(args)
    if args.child:
        child(args.child, args.tokens, args.refit_epochs)
        return
    if args.quick:
        args.layers, args.width, args.tokens = 2, 64, 256
    compared = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = measure(folder / "whole", args)
        seconds = sum(found["seconds"].values())
        for what, field in (("fitting", "fitting_bytes"), ("writing", "peak_bytes")):
            compared[f"peak resident memory, {what}"] = Comparison(
                ours=found[field], unit="bytes", peer=found["checkpoint_bytes"],
                peer_name="the checkpoint",
            )  # fmt: skip
        if not args.quick:
            found["killed"] = killed(folder / "whole", folder / "killed", seconds / 2, args)
            compared["going on after a kill half-way"] = Comparison(
                ours=sum(found["killed"]["then"]["seconds"].values()), unit="s", peer=seconds,
                peer_name="the whole way",
            )  # fmt: skip
    save("streaming", f"{args.layers} layers of width {args.width}", compared, args, **found)


if __name__ == "__main__":
    main()
