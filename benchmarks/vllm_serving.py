"""Factored folders and ordinary checkpoints of ours under vLLM: the same text, and how fast.

    .ci/install-vllm .venv-vllm                     # a vLLM for CPUs, with this project beside it
    python benchmarks/vllm_serving.py smollm2/ hybrid/1.25 narrow/ --python .venv-vllm/bin/python

The first folder is the original, beside which the others' speeds stand. A factored folder runs once
by each policy (`--policies`), others as they are. Parts of docs/results/vllm_serving.json for
each number type, `compiled` as vLLM does by itself, or `eager`: how many of four greedy texts of 32
tokens are those of transformers in the same type, and tokens per second of prompts and of 32 tokens
decoded after them, one text and sixteen at once. Models run in turns, each time in a process of its
own; figures are medians of these turns.
"""

import argparse
import json
import os
import subprocess
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, get_args

from support.results import Comparison, begin, parser, save
from transformers import AutoConfig

from tensorllm.checkpoint.manifest import factored_manifest
from tensorllm.commands.generate import generate
from tensorllm.requests.others import GenerateRequest
from tensorllm.runtime.cost import Policy

PROMPTS = ("Once upon a time", "The history of tea", "Water boils when", "def fibonacci(n):")
TEXT, DECODED, BATCHES = 32, 32, ((1, 256), (16, 64))
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
CACHE_GIB = "1"  # of vLLM's keys and values


class Model(NamedTuple):
    """A folder, and the policy by which it runs if it is factored."""

    folder: Path
    policy: Policy | None

    @property
    def name(self) -> str:
        """The folder's name, of a ratio in a folder of several that one's too, and the policy."""
        here = self.folder.resolve()
        names = [here.parent.name] if here.name[0].isdigit() else []
        return " ".join([*names, here.name, *filter(None, [self.policy])])


def texts(model: Model, dtype: str) -> list[str]:
    """Transformers' own."""
    request = GenerateRequest(
        model=str(model.folder), prompts=PROMPTS, max_new_tokens=TEXT, dtype=dtype,
        policy=model.policy or "always",
    )  # fmt: skip
    return [
        whole.removeprefix(prompt) for whole, prompt in zip(generate(request), PROMPTS, strict=True)
    ]


def run(model: Model, dtype: str, args: argparse.Namespace, *, turns: int) -> dict[str, Any]:
    """One model under vLLM, in a process of its own."""
    wanted = {
        "dtype": DTYPES[dtype], "eager": args.eager, "prompts": PROMPTS, "text": TEXT,
        "decoded": DECODED, "batches": BATCHES, "turns": turns,
        "policy": model.policy,
    }  # fmt: skip
    child = Path(__file__).parent / "support/vllm_run.py"
    own = {
        "VLLM_CPU_KVCACHE_SPACE": CACHE_GIB, "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(args.threads), "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }  # fmt: skip
    done = subprocess.run(
        [args.python, child, model.folder.resolve(), json.dumps(wanted)],
        env={**os.environ, **own}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows(models: list[Model], dtype: str, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By the model's name: bytes, texts, and speeds by batch size."""
    taken: dict[str, list[dict[str, Any]]] = {model.name: [] for model in models}
    for _ in range(1 if args.quick else args.rounds):
        for model in models:
            found = run(model, dtype, args, turns=args.repeats)
            taken[model.name].append(found)
            print(model.name, dtype, json.dumps(found["speeds"]), flush=True)
    out = {}
    for model in models:
        found, wanted = taken[model.name], texts(model, dtype)
        out[model.name] = {
            "bytes": sum(file.stat().st_size for file in model.folder.glob("*.safetensors")),
            "ffn_width": AutoConfig.from_pretrained(model.folder).intermediate_size,
            "texts": len(PROMPTS),
            "same_texts": sum(a == b for a, b in zip(found[0]["texts"], wanted, strict=True)),
            "speeds": {
                batch: {
                    what: median(one["speeds"][batch][what] for one in found)
                    for what in ("prompt", "decode")
                }
                for batch in found[0]["speeds"]
            },
        }
    return out


def compared(found: dict[str, dict[str, Any]]) -> dict[str, Comparison]:
    first, *others = found
    return {
        f"{other}, {what}, {batch} at once": Comparison(
            ours=speed, unit="tokens/s", peer=found[first]["speeds"][batch][what], peer_name=first,
            more_is_better=True,
        )
        for other in others
        for batch, both in found[other]["speeds"].items()
        for what, speed in both.items()
    }  # fmt: skip


def main() -> None:
    options = parser(__doc__)
    options.add_argument("folders", type=Path, nargs="+", help="the original, then others")
    options.add_argument("--python", type=Path, required=True, help="of vLLM's environment")
    options.add_argument(
        "--policies", nargs="+", choices=get_args(Policy), default=get_args(Policy)
    )
    options.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=["bf16"])
    options.add_argument("--eager", action="store_true", help="without torch.compile")
    options.add_argument("--rounds", type=int, default=3, help="processes of each model")
    options.add_argument("--repeats", type=int, default=5, help="measurements in a process")
    args = options.parse_args()
    begin(args)
    version = subprocess.run(
        [args.python, "-c", "from importlib.metadata import packages_distributions as p, version;"
         "print(*(f'{n} {version(n)}' for n in sorted(set(p()['vllm']))))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    models = [
        Model(folder, policy)
        for folder in args.folders
        for policy in (args.policies if factored_manifest(folder) else [None])
    ]
    for dtype in args.dtypes:
        found = rows(models, dtype, args)
        part = f"{dtype}, {'eager' if args.eager else 'compiled'}"
        save("vllm_serving", part, compared(found), args, rows=found, vllm=version)


if __name__ == "__main__":
    main()
