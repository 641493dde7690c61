"""A real model, whole, dense and compressed, as it runs: used by `runtime.py --part real`.

Speed depends on shapes alone, so `svd-llm`'s form and what `export --format narrow` writes, an FFN
that is less wide, hold random numbers.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from support.results import Comparison
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import tensorllm as tl
from tensorllm.checkpoint.loading import choices_of, load, predicted_of
from tensorllm.checkpoint.manifest import read_manifest
from tensorllm.compression.publish import peak_resident_bytes
from tensorllm.compressors import COMPRESSORS, PlainSVD
from tensorllm.runtime.cache import grow_in_place
from tensorllm.runtime.measure import interleaved, measure, medians, weight_bytes
from tensorllm.runtime.products import vector_times
from tensorllm.tensors.factors import LowRank

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WANTED_OF_BYTES = 0.9  # of the ratio of bytes read per token, what decoding is to gain
WANTED_PREFILL = {1.25: 1.0, 1.5: 1.15}


def narrow(source: Path, target: Path, ratio: float) -> None:
    """A model of the same class whose FFN is less wide: all matrices `ratio` times smaller."""
    config = AutoConfig.from_pretrained(source)
    attention = 2 * config.hidden_size * config.head_dim * (
        config.num_attention_heads + config.num_key_value_heads
    )  # fmt: skip
    ffn = 3 * config.hidden_size
    kept = (attention + ffn * config.intermediate_size) / ratio - attention
    config.intermediate_size = max(8, int(kept / ffn) // 8 * 8)
    with torch.device("cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(target)


@COMPRESSORS.register("drawn")
@dataclass(frozen=True, kw_only=True)
class Drawn(PlainSVD):
    """Random factors in the shapes of a truncated SVD, which would take minutes."""

    def decompose(self, w: Tensor, statistics: Any = None) -> LowRank:
        rank, (rows, columns) = self.rank_of(w.shape), w.shape
        u_IR, v_RD = torch.randn(rows, rank), torch.randn(rank, columns)
        return LowRank(u_IR / rank, v_RD / columns)


def low_rank(source: Path, target: Path, ratio: float) -> None:
    """All matrices truncated at the same share, as the field's methods do."""
    model = AutoModelForCausalLM.from_pretrained(source)
    tl.compress(model, Drawn(kept=1 / ratio))
    tl.save(model, target)


MADE = {"svd-llm": low_rank, "narrow": narrow}


def opened(folder: Path, how: str, dtype: str) -> Any:
    """A folder as transformers loads it (`plain`; `growing`: with our caches), or by a policy."""
    kind = DTYPES[dtype]
    if how in ("plain", "growing"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind).eval()
        if how == "growing":
            grow_in_place(model)
        return model
    return load(folder, policy=how, dtype=kind)  # type: ignore[arg-type]


def read_bytes(model: Any) -> int:
    """What a token that is decoded reads: all weights but the rows of a table of its own."""
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    spare = 0 if head.data_ptr() == table.data_ptr() else table.nbytes
    return weight_bytes(model) - spare


@torch.inference_mode()
def read_speed(dtype: str) -> float:
    """Bytes per second of the fastest product of a vector and a matrix beyond all caches."""
    w, x = torch.ones(2**17, 512, dtype=DTYPES[dtype]), torch.ones(2**17, dtype=DTYPES[dtype])
    return w.nbytes / medians(interleaved({"read": lambda: vector_times(x, w)}, 9))["read"]


def folders(args: Any, ratio: float, made: Path) -> dict[str, tuple[Path, str]]:
    """name -> (folder, how it is opened) of what is compared at a ratio."""
    out = {"dense": (args.model, "plain")}
    if args.own_cache:
        out["dense, cache in place"] = (args.model, "growing")
    hybrid = args.hybrid / f"{ratio:g}" if args.hybrid else None
    if hybrid is not None and hybrid.is_dir():
        out |= {f"activation-hybrid, {how}": (hybrid, how) for how in args.policies}
    for name, make in MADE.items():
        if name in args.methods:
            target = made / f"{name}-{ratio:g}"
            make(args.model, target, ratio)
            how = "plain" if read_manifest(target) is None else "always"
            out[name] = (target, how)
    return out


def real(args: Any, repeats: int) -> Iterator[dict[str, Any]]:
    """Every ratio, dtype and batch size: all models in turns, and the memory of each by itself."""
    with TemporaryDirectory() as made:
        for ratio in args.ratios:
            found = folders(args, ratio, Path(made))
            for dtype in args.dtypes:
                models = {name: opened(*where, dtype) for name, where in found.items()}
                sizes = args.prompt, min(args.new, 8)
                peaks = {
                    n: peak(*w, dtype, *sizes) if dtype in args.peaks else None
                    for n, w in found.items()
                }
                speed = read_speed(dtype)
                for batch in args.batches:
                    prompt, new = args.prompt, args.new
                    if batch > 1:  # else it would take an hour
                        prompt, new = prompt // 8, new // 4
                    where = {name: folder for name, (folder, _) in found.items()}
                    row = one(models, where, prompt, new, repeats, batch)
                    row |= {
                        "ratio": ratio,
                        "dtype": dtype,
                        "batch": batch,
                        "prompt": prompt,
                        "new": new,
                    }
                    row |= {"peak_bytes": peaks, "read_bytes_per_second": speed}
                    for name, times in row["times_dense"].items():
                        print(ratio, dtype, batch, name, json.dumps(times), flush=True)
                    yield row


def one(
    models: Mapping[str, Any],
    folders: Mapping[str, Path],
    prompt: int,
    new: int,
    repeats: int,
    batch: int,
) -> dict[str, Any]:
    """Figures of each model, and how many times better than dense each is."""
    found = measure(models, prompt, new, repeats, batch=batch)
    reads = {name: read_bytes(model) for name, model in models.items()}
    dense = found["dense"]
    times = {}
    for name, model in models.items():
        mine = found[name]
        assert mine.decode_tokens_per_second is not None, "a causal model"
        assert dense.decode_tokens_per_second is not None, "a causal model"
        times[name] = {
            "prefill": mine.prefill_tokens_per_second / dense.prefill_tokens_per_second,
            "decode": mine.decode_tokens_per_second / dense.decode_tokens_per_second,
            "bytes_read": reads["dense"] / reads[name],
            **predicted(model, folders[name]),  # of one text, whatever the batch
        }
    return {
        "models": {name: m.to_json() for name, m in found.items()},
        "bytes_per_token": reads,
        "times_dense": times,
    }


def predicted(model: Any, folder: Path) -> dict[str, float]:
    """What the cost model says of a model of ours."""
    found = predicted_of(model, folder) if choices_of(model) else None
    if found is None:
        return {}
    return {"predicted_prefill": found[0], "predicted_decode": found[1]}


def compared(rows: list[dict[str, Any]]) -> dict[str, Comparison]:
    """Each compressed model beside the dense one: speed, memory, and the floor of decoding."""
    out = {}
    for row in rows:
        batch, speed, ratio = row["batch"], row["read_bytes_per_second"], row["ratio"]
        dense = row["models"]["dense"]
        for name, mine in row["models"].items():
            if name == "dense":
                continue
            smaller = row["times_dense"][name]["bytes_read"]  # the dense model's own is 1
            wanted = batch == 1 and smaller > 1
            at = f"{name}, ratio {ratio:g}, {row['dtype']}, batch {batch}"
            out[f"prefill of {row['prompt']}, {at}"] = Comparison(
                ours=mine["prefill_tokens_per_second"], peer=dense["prefill_tokens_per_second"],
                peer_name="dense", unit="tokens/s", more_is_better=True,
                wanted=WANTED_PREFILL.get(ratio) if wanted else None,
            )  # fmt: skip
            out[f"decode, {at}"] = Comparison(
                ours=mine["decode_tokens_per_second"], peer=dense["decode_tokens_per_second"],
                peer_name="dense", unit="tokens/s", more_is_better=True,
                wanted=WANTED_OF_BYTES * smaller if smaller > 1 else None,
                floor=batch * speed / row["bytes_per_token"][name],
            )  # fmt: skip
            peaks = row["peak_bytes"]
            if batch == 1 and peaks[name] and peaks["dense"]:
                out[f"peak memory, {name}, ratio {ratio:g}, {row['dtype']}"] = Comparison(
                    ours=peaks[name], peer=peaks["dense"], peer_name="dense", unit="bytes",
                    wanted=1.0,
                )  # fmt: skip
    return out


@cache
def peak(folder: Path, how: str, dtype: str, prompt: int, new: int) -> int:
    """Peak resident bytes of a process that opens one model and runs it once."""
    given = [str(folder.absolute()), how, dtype, str(prompt), str(new)]
    line = "from support import real_runtime as r; import sys; r.print_peak(*sys.argv[1:])"
    run = subprocess.run(
        [sys.executable, "-c", line, *given],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(run.stdout.splitlines()[-1])


def print_peak(folder: str, how: str, dtype: str, prompt: str, new: str) -> None:
    measure({"model": opened(Path(folder), how, dtype)}, int(prompt), int(new), 1)
    print(peak_resident_bytes())
