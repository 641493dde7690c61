"""Parts of scaling.py with a model: compressing, evaluating, searching, fitting to text, files."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from load_save import compressed, copied, loaded, make_model, read, touched, weight_bytes
from support.curves import Curve, seconds
from support.scaling_tensors import ranks_at
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import tensorllm as tl
from tensorllm.calibration import Calibration, fit
from tensorllm.commands.search import run
from tensorllm.compression.engine import compressed as edited
from tensorllm.compressors import ActivationHybrid
from tensorllm.data.demo import MODEL_DIR
from tensorllm.evaluation.evaluate import make_dataset, score
from tensorllm.requests.search import SearchRequest
from tensorllm.search.study import Study


def gptj(width: int, layers: int) -> Any:
    torch.manual_seed(0)
    config = GPTJConfig(
        n_embd=width, n_layer=layers, n_head=width // 32, rotary_dim=16, n_positions=512,
        vocab_size=1024, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPTJForCausalLM(config).eval()


def compress(quick: bool) -> dict[str, Any]:
    """In memory, all layers, with the figures that a report shows."""
    width = 64 if quick else 512

    def prepare(layers: int) -> Callable[[], Any]:
        model = gptj(width, layers)
        ranks = ranks_at("strong", width, 32, 4)

        def call() -> None:
            with edited(model, tl.SharedTucker4D(ranks=ranks)):
                pass

        return call

    curve = Curve(
        over="layers of width 512", xs=(2, 4, 8, 16), quick=(1, 2, 3), prepare=prepare, expected=1
    )
    return {"compress over layers": curve.measure(quick)}


def evaluate(quick: bool) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    data = make_dataset("demo", split="all")
    data.connect(tokenizer)
    new = data.max_new_tokens
    choices = [e for e in data.examples if e.choices][: 8 if quick else 96]  # no generation
    tokens = sum(len(tokenizer(e.prompt).input_ids) for e in choices)
    demo = AutoModelForCausalLM.from_pretrained(MODEL_DIR).eval()

    def examples(count: int) -> Callable[[], Any]:
        return lambda: score(demo, tokenizer, data.examples[:count], max_new_tokens=new)

    def width(size: int) -> Callable[[], Any]:
        model = gptj(size, 1 if quick else 4)
        return lambda: score(model, tokenizer, choices)

    curves = {
        "evaluate over examples": Curve(
            over="examples", xs=(450, 900, 1800, 3600), quick=(8, 16, 24), prepare=examples,
            expected=1,
        ),
        "evaluate over parameters": Curve(
            over="parameters in layers", xs=(256, 512, 768, 1024, 1536), quick=(32, 64, 96),
            prepare=width, expected=1, x=lambda size: (1 if quick else 4) * 12.0 * size**2,
        ),
    }  # fmt: skip
    found = {name: curve.measure(quick) for name, curve in curves.items()}
    found["evaluate over parameters"] |= {"prompt_tokens": tokens}
    return found


def search(quick: bool) -> dict[str, Any]:
    """Trials in one process, each examined to its end; and a whole search by one and two."""
    limit = 20 if quick else 500

    def request(trials: int, folder: str, workers: int = 1) -> SearchRequest:
        return SearchRequest(
            model="demo", dataset="demo", mode="shared-tucker", sampler="grid", trials=trials,
            limit=limit, study=Path(folder) / f"{trials}-{workers}", workers=workers,
        )  # fmt: skip

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:

        def work(trials: int) -> Callable[[], Any]:
            made = Study(request(trials, folder))
            queue = made.queue(made.request.study or Path(folder))
            made.fill(queue)
            return lambda: made.work(queue)

        curve = Curve(
            over="trials", xs=(12, 24, 48, 96), quick=(2, 3, 4), prepare=work, expected=1, turns=1
        )
        found["search over trials"] = curve.measure(quick)
        if not quick:
            whole = {
                str(n): seconds(lambda n=n: run(request(97, folder, n)), turns=1) for n in (1, 2)
            }
            found["search over workers"] = {"trials": 97, "seconds": whole}
    return found


def calibrate(quick: bool) -> dict[str, Any]:
    """A fit of attention and FFN to text: moments with gradients, sizes, layers one by one."""
    layers = 1 if quick else 4

    def prepare(width: int, tokens: int) -> Callable[[], Any]:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=4, vocab_size=512, max_position_embeddings=256,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        length = 64 if quick else 256
        ids = torch.randint(0, 512, (tokens // length, length)).tolist()
        text = Calibration(tuple(map(tuple, ids)), source="random")
        return lambda: fit(ActivationHybrid(target_ratio=2), model, text)

    small = 32 if quick else 256
    return {
        "calibrate over tokens": Curve(
            over="tokens, width 256", xs=(2048, 4096, 8192, 16384), quick=(128, 256, 384),
            prepare=lambda tokens: prepare(small, tokens), expected=1, turns=1,
        ).measure(quick),
        "calibrate over width": Curve(
            over="model width D, 4096 tokens", xs=(128, 256, 384, 512), quick=(16, 32, 48),
            prepare=lambda width: prepare(width, 128 if quick else 4096), expected=3, turns=1,
        ).measure(quick),
    }  # fmt: skip


def files(quick: bool) -> dict[str, Any]:
    """Checkpoints of growing size: streamed, loaded, copied."""
    width, sizes = (64, (1, 2, 3)) if quick else (1024, (2, 4, 8, 16, 32))
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        source, dense, factored = (
            {n: Path(folder) / f"{kind}-{n}" for n in sizes}
            for kind in ("source", "dense", "factored")
        )
        for n, path in source.items():
            make_model(path, n, width)
            compressed(path, dense[n], "dense", layers=(0,))
            compressed(path, factored[n], "factored", layers=None)

        def fresh(n: int, call: Callable[[Path, Path], Any]) -> Callable[[], Any]:
            def run() -> None:
                with tempfile.TemporaryDirectory(dir=folder) as place:
                    call(source[n], Path(place) / "out")

            return run

        ways: dict[str, Callable[[int], Callable[[], Any]]] = {
            "copy and sync": lambda n: fresh(n, copied),
            "stream a folder": lambda n: fresh(
                n, lambda a, b: compressed(a, b, "dense", layers=(0,))
            ),
            "read": lambda n: lambda: read(source[n]),
            "load by transformers": lambda n: lambda: loaded(source[n]),
            "load": lambda n: lambda: touched(tl.load(dense[n])),
            "load, checksums compared": lambda n: lambda: touched(tl.load(dense[n], verify=True)),
            "load factored": lambda n: lambda: loaded(factored[n]),
        }
        for name, prepare in ways.items():
            found[f"{name} over bytes"] = Curve(
                over="bytes of the checkpoint", xs=sizes, quick=sizes, prepare=prepare,
                expected=1, x=lambda n: float(weight_bytes(source[n])),
            ).measure(quick)  # fmt: skip
    return found
