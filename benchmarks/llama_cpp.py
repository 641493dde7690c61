"""Ordinary checkpoints that tensorllm wrote, under llama.cpp: the same text, and how fast.

    tensorllm export factored/ dense/ --format dense
    tensorllm export factored/ narrow/ --format narrow
    python benchmarks/llama_cpp.py smollm2/ dense/ narrow/ --converter convert_hf_to_gguf.py

Needs llama.cpp's converter with its `gguf-py` beside it, and `pip install xllamacpp` (llama.cpp as
a wheel); none of them is a dependency. The first folder is the original, beside which the others'
speeds stand.

A part of docs/results/llama_cpp.json for each number type: of each folder the size of its GGUF
file, how many of four greedy texts of 32 tokens are those of transformers in float32, and tokens
per second of a prompt of 256 and of 64 that are decoded after it: medians of runs in turn.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from support.results import Comparison, begin, parser, save
from transformers import AutoConfig, AutoTokenizer

from tensorllm.commands.generate import generate
from tensorllm.requests.others import GenerateRequest

PROMPTS = ("Once upon a time", "The history of tea", "Water boils when", "def fibonacci(n):")
TEXT, PROMPT, DECODED, ROUNDS = 32, 256, 64, 5


def convert(folder: Path, converter: Path, kind: str, out: Path) -> None:
    """A GGUF file of the folder."""
    path = os.pathsep.join([str(converter.parent / "gguf-py"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, converter, folder, "--outtype", kind, "--outfile", out]
    subprocess.run([*map(str, command)], env={**os.environ, "PYTHONPATH": path}, check=True)


def opened(file: Path, threads: int) -> Any:
    """llama.cpp with a model, its cache in float32: rounding must not decide between near words."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup = str(file), 1024, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.n_parallel = 1
    return xllamacpp.Server(params)


def written(server: Any, prompt: str | list[int], tokens: int) -> dict[str, Any]:
    """What it writes behind a prompt, always the likeliest token, and its timings."""
    asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "cache_prompt": False}
    found: dict[str, Any] = server.handle_completions({**asked, "ignore_eos": tokens == DECODED})
    return found


def rates(server: Any, vocabulary: int, seed: int) -> tuple[float, float]:
    """Tokens per second of a random prompt, and of what is decoded after it."""
    draws = random.Random(seed)
    prompt = [draws.randrange(vocabulary) for _ in range(PROMPT)]
    timings = written(server, prompt, DECODED)["timings"]
    return timings["prompt_per_second"], timings["predicted_per_second"]


def texts(folder: Path) -> list[str]:
    """Transformers' own."""
    request = GenerateRequest(model=str(folder), prompts=PROMPTS, max_new_tokens=TEXT, dtype="fp32")
    return [
        whole.removeprefix(prompt) for whole, prompt in zip(generate(request), PROMPTS, strict=True)
    ]


def measured(folders: list[Path], kind: str, scratch: Path, args: argparse.Namespace) -> None:
    rows: dict[str, dict[str, Any]] = {}
    servers = {}
    for folder in folders:
        file = scratch / f"{folder.name}.gguf"
        convert(folder, args.converter, kind, file)
        server = servers[folder.name] = opened(file, args.threads)
        found = [written(server, prompt, TEXT)["choices"][0]["text"] for prompt in PROMPTS]
        rows[folder.name] = {
            "bytes": file.stat().st_size,
            "ffn_width": AutoConfig.from_pretrained(folder).intermediate_size,
            "texts": len(PROMPTS),
            "same_texts": sum(a == b for a, b in zip(found, texts(folder), strict=True)),
        }
    vocabulary = len(AutoTokenizer.from_pretrained(folders[0]))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
    for turn in range(1 if args.quick else ROUNDS):
        for name, server in servers.items():
            times[name].append(rates(server, vocabulary, turn))
    comparisons = {}
    first = folders[0].name
    for name, taken in times.items():
        for what, each in zip(("prompt", "decode"), zip(*taken, strict=True), strict=True):
            rows[name][f"{what}_per_s"] = statistics.median(each)
    for name in times.keys() - {first}:
        for what in ("prompt", "decode"):
            comparisons[f"{name}, {what}"] = Comparison(
                ours=rows[name][f"{what}_per_s"],
                unit="tokens/s",
                peer=rows[first][f"{what}_per_s"],
                peer_name=first,
                more_is_better=True,
            )
    save("llama_cpp", kind, comparisons, args, rows=rows, xllamacpp=version())


def version() -> str:
    from importlib.metadata import version

    return version("xllamacpp")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("folders", type=Path, nargs="+", help="ordinary checkpoints")
    options.add_argument("--converter", type=Path, required=True)
    options.add_argument("--kinds", nargs="+", default=["f32", "q8_0"], help="of numbers")
    args = options.parse_args()
    begin(args)
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as scratch:
            measured(args.folders, kind, Path(scratch), args)


if __name__ == "__main__":
    main()
