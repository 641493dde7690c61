"""Loading and saving checkpoints, beside transformers' own way, and the floor of the disk.

    python benchmarks/load_save.py
    python benchmarks/load_save.py --layers 12 --width 2048     # 1.3 GB
    python benchmarks/load_save.py --model SmolLM2-135M-Instruct/

A random GPT-J in bfloat16, or with `--model` a real model, of which every matrix is factored and
only loading is measured. Ours: a folder streamed into another one, of which one layer is
compressed; all layers' attention compressed to a factored folder, and that exported as a dense one;
both loaded. Peer: `from_pretrained` and `save_pretrained` of the same model. Floor: the bytes
copied to another file and synced, or only read. Files are in the page cache when they are read, on
both sides; what is written is synced before the clock stops (transformers' for it). Ours checks
every number that it writes for NaN and writes every file's SHA-256, which transformers does not;
loading compares sizes, and checksums where it is asked to. Where dtypes agree transformers maps a
dense file instead of reading it, so that touching its pages is all that the clock sees. Peak memory
is that of a fresh process.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from support.results import Comparison, begin, parser, save
from transformers import AutoModelForCausalLM, GPTJConfig

import tensorllm as tl
from tensorllm.compression.engine import compress_folder
from tensorllm.compression.export import export
from tensorllm.compression.publish import peak_resident_bytes
from tensorllm.compression.task import FolderTask
from tensorllm.compressors.settings import make_compressor

REPEATS = 3
CHUNK = 2**24


def make_model(folder: Path, layers: int, width: int) -> int:
    """A random model's folder; returns its weights' bytes."""
    torch.manual_seed(0)
    config = GPTJConfig(
        n_embd=width, n_layer=layers, n_head=width // 64, rotary_dim=32, vocab_size=8192,
        n_positions=512, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return weight_bytes(folder)


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def sync(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def copied(source: Path, target: Path) -> None:
    """The floor of every way to write: the bytes read, written and synced."""
    target.mkdir()
    for path in source.glob("*.safetensors"):
        with path.open("rb") as a, (target / path.name).open("wb") as b:
            while chunk := a.read(CHUNK):
                b.write(chunk)
    sync(target)


def read(source: Path) -> None:
    """The floor of every way to load: the bytes brought to memory of one's own."""
    for path in source.glob("*.safetensors"):
        memory = bytearray(path.stat().st_size)
        with path.open("rb") as file:
            file.readinto(memory)


def compressed(source: Path, target: Path, form: Any, layers: Sequence[int] | None) -> None:
    """Stream a folder into another one, with the attention of some layers compressed."""
    width = json.loads((source / "config.json").read_text())["n_embd"]
    compressor = tl.SharedTucker4D(ranks=(width // 13, 5, 2), sweeps=0)
    compress_folder(
        FolderTask(source=source, target=target, compressor=compressor, layers=layers, format=form)
    )


def loaded(folder: Path) -> Any:
    """Through transformers, as users do."""
    return touched(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))


def touched(model: Any) -> Any:
    """The model, after every page of its weights has been read: mapped files are read by that."""
    for p in model.parameters():
        p.view(-1)[:: 2**9].sum()
    return model


def saved(source: Path, target: Path) -> None:
    """transformers' way to make a folder of another one."""
    loaded(source).save_pretrained(target)
    sync(target)


class Clock:
    """The fastest of some turns; what a turn writes is thrown away, but for the last."""

    def __init__(self, folder: Path, repeats: int) -> None:
        self.folder, self.repeats = folder, repeats
        self.seconds: dict[str, float] = {}

    def read(self, name: str, call: Callable[[], Any]) -> None:
        self.seconds[name] = min(self._turn(call) for _ in range(self.repeats))

    def write(self, name: str, call: Callable[[Path], Any]) -> Path:
        target, times = self.folder / name, []
        for _ in range(self.repeats):
            shutil.rmtree(target, ignore_errors=True)
            times.append(self._turn(lambda: call(target)))
        self.seconds[name] = min(times)
        return target

    def _turn(self, call: Callable[[], Any]) -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started


def peak(folder: Path) -> int:
    """Peak resident bytes of a fresh process that loads a folder."""
    run = subprocess.run(
        [sys.executable, __file__, "--peak", str(folder)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(run.stdout.split()[-1])


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and bytes of every way, on one model."""
    source = folder / "source"
    size = make_model(source, args.layers, args.width)
    clock = Clock(folder, 1 if args.quick else REPEATS)
    clock.write("copy and sync", lambda target: copied(source, target))
    clock.write("stream to dense", lambda target: compressed(source, target, "dense", (0,)))
    factored = clock.write(
        "stream to factored", lambda target: compressed(source, target, "factored", None)
    )
    dense = clock.write("export to dense", lambda target: export(factored, target))
    clock.write("transformers, load and save", lambda target: saved(source, target))
    clock.read("read dense", lambda: read(dense))
    clock.read("read factored", lambda: read(factored))
    clock.read("transformers, load dense", lambda: loaded(source))
    clock.read("load dense", lambda: touched(tl.load(dense)))
    clock.read("load dense, checksums compared", lambda: touched(tl.load(dense, verify=True)))
    clock.read("load factored", lambda: loaded(factored))
    sizes = {"dense": size, "factored": weight_bytes(factored)}
    peaks = {} if args.quick else {"dense": peak(source), "factored": peak(factored)}
    return {"seconds": clock.seconds, "bytes": sizes, "peak_bytes": peaks}


def measure_real(model: Path, folder: Path) -> dict[str, Comparison]:
    """A real model with two factors in the place of every matrix."""
    factored = folder / "factored"
    svd = make_compressor("svd", {"kept": 0.6})
    compress_folder(FolderTask(source=model, target=factored, compressor=svd, format="factored"))
    clock = Clock(folder, 3 * REPEATS)
    clock.read("read", lambda: read(factored))
    clock.read("dense", lambda: loaded(model))
    clock.read("factored", lambda: loaded(factored))
    s = clock.seconds
    row = Comparison(
        ours=s["factored"], unit="s", peer=s["dense"], peer_name="transformers, dense", wanted=1,
        floor=s["read"],
    )  # fmt: skip
    return {"load factored": row}


def comparisons(found: dict[str, Any]) -> dict[str, Comparison]:
    """Ours beside transformers' way to the same end."""
    s, theirs = found["seconds"], "transformers"
    rewrite, load = s["transformers, load and save"], s["transformers, load dense"]
    floor = s["copy and sync"]
    out = {
        "stream to dense, one layer compressed": (s["stream to dense"], rewrite, floor),
        "export to dense": (s["export to dense"], rewrite, floor),
        "load dense": (s["load dense"], load, s["read dense"]),
        "load dense, checksums compared": (
            s["load dense, checksums compared"],
            load,
            s["read dense"],
        ),
        "load factored": (s["load factored"], load, s["read factored"]),
    }
    rows = {
        what: Comparison(ours=ours, unit="s", peer=peer, peer_name=theirs, floor=least)
        for what, (ours, peer, least) in out.items()
    }
    b = found["bytes"]
    rows["weight files"] = Comparison(
        ours=b["factored"], unit="bytes", peer=b["dense"], peer_name="dense"
    )
    if found["peak_bytes"]:
        ours, peer = found["peak_bytes"]["factored"], found["peak_bytes"]["dense"]
        rows["peak memory of loading"] = Comparison(
            ours=ours, unit="bytes", peer=peer, peer_name="dense"
        )
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=8)
    options.add_argument("--width", type=int, default=1536)
    options.add_argument("--model", type=Path, help="folder of a real model")
    options.add_argument("--folder", type=Path, help="on the disk to measure; by default /tmp")
    options.add_argument("--peak", type=Path, help=argparse.SUPPRESS)
    args = options.parse_args()
    begin(args)
    if args.peak:
        loaded(args.peak)
        print(peak_resident_bytes())
        return
    if args.quick:
        args.layers, args.width = 2, 128
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.model:
            shown = measure_real(args.model, Path(folder))
            save("load_save", args.model.resolve().name, shown, args, model=args.model.name)
            return
        found = measure(Path(folder), args)
    sizes = {"layers": args.layers, "width": args.width}
    save("load_save", f"{args.layers} x {args.width}", comparisons(found), args, **sizes, **found)


if __name__ == "__main__":
    main()
