"""`--cache` beside both of its choices, as a model decodes: used by `runtime.py --part cache`."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch
from support.attention_block import gptj
from support.results import Comparison
from transformers import GPTJForCausalLM

import tensorllm as tl
from tensorllm.runtime.cost import Cache
from tensorllm.runtime.measure import measure

PROMPT, NEW = 512, 32
LAYERS = 4
# Values of 16 numbers and of 60 in place of 64: far narrower, and hardly.
RANKS = ((256, 16, 4), (640, 60, 4))


def caches(repeats: int, quick: bool) -> list[dict[str, Any]]:
    """A model of the shared Tucker tensor, in its factors, with each cache; in turns."""
    torch.manual_seed(0)
    sizes, ranks = ((64, 2, 4), ((16, 4, 4),)) if quick else ((1024, LAYERS, 16), RANKS)
    rows = []
    for each in ranks:
        model = GPTJForCausalLM(gptj(*sizes, vocab_size=4096)).eval()
        with TemporaryDirectory() as folder:
            tl.compress(model, tl.SharedTucker4D(ranks=each, sweeps=0))
            tl.save(model, Path(folder) / "out")
            models = {
                name: tl.load(Path(folder) / "out", policy="always", cache=name)
                for name in get_args(Cache)
            }
            found = measure(models, PROMPT, NEW, repeats)
        rows.append({"ranks": each, "models": {name: m.to_json() for name, m in found.items()}})
    return rows


def compared(rows: list[dict[str, Any]]) -> dict[str, Comparison]:
    """What `auto` takes beside the faster of the two."""
    out = {}
    for row in rows:
        speed = {name: m["decode_tokens_per_second"] for name, m in row["models"].items()}
        auto = speed.pop("auto")
        best = max(speed, key=lambda name: speed[name])
        out[f"decode, --cache auto, ranks {row['ranks']}"] = Comparison(
            ours=auto, peer=speed[best], peer_name=best, unit="tokens/s", more_is_better=True
        )
    return out
