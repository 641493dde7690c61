"""A factored model as an ONNX graph, beside the dense model's graph, both under onnxruntime.

    python benchmarks/graphs.py --model smollm2/

`svd` keeps 60 % of the numbers of all seven matrices of each layer: this is about speed, not about
what the model says. Times are the fastest of some turns of a whole prompt without a cache, which is
what a graph takes; the models in transformers, dense and factored, take turns with them. Files are
in float32. Needs `pip install 'tensorllm[onnx]'`.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.results import Comparison, begin, parser, save
from transformers import AutoModelForCausalLM

import tensorllm as tl
from tensorllm.checkpoint.loading import load
from tensorllm.compression.graph import GRAPHS, NAMES, export_graph, trace
from tensorllm.compressors.settings import make_compressor
from tensorllm.data.demo import MODEL_DIR

KEPT = 0.6
PROMPTS, QUICK = (32, 512), (8,)
Run = Callable[[torch.Tensor], torch.Tensor]


def session(folder: Path, threads: int) -> Run:
    """A graph in onnxruntime: token ids (1, T) to logits (1, T, V)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    path = str(folder / "model.onnx")
    opened = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(ids: torch.Tensor) -> torch.Tensor:
        given = dict(zip(NAMES, (ids.numpy(), torch.ones_like(ids).numpy()), strict=True))
        return torch.from_numpy(opened.run(["logits"], given)[0])

    return run


def eager(model: Any) -> Run:
    """The model itself, in torch."""

    @torch.inference_mode()
    def run(ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return logits

    return run


def timed(runs: dict[str, Run], ids: torch.Tensor, turns: int) -> dict[str, float]:
    """The fastest of some turns of each, one after another."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(turns + 1):  # the first one warms up
        for name, run in runs.items():
            started = time.perf_counter()
            run(ids)
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("model.onnx*"))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", type=Path, help="folder of a causal model")
    options.add_argument("--turns", type=int, default=5)
    args = options.parse_args()
    if not args.quick and args.model is None:
        sys.exit("give --model FOLDER")
    begin(args)
    folder = MODEL_DIR if args.quick else args.model
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        (scratch / "dense").mkdir()
        GRAPHS["onnx"].write(trace(dense), scratch / "dense")
        edited = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tl.compress(edited, make_compressor("svd", {"kept": KEPT}))
        tl.save(edited, scratch / "factored")
        del edited
        export_graph(scratch / "factored", scratch / "graph", "onnx")
        runs = {
            "ours": session(scratch / "graph", args.threads),
            "dense": session(scratch / "dense", args.threads),
            "transformers, factored": eager(load(scratch / "factored", policy="always")),
            "transformers, dense": eager(dense),
        }
        sizes = {"factored": weights(scratch / "graph"), "dense": weights(scratch / "dense")}
        words, random = dense.config.vocab_size, torch.Generator().manual_seed(0)
        times, shown = {}, {}
        for tokens in QUICK if args.quick else PROMPTS:
            ids = torch.randint(words, (1, tokens), generator=random)
            torch.testing.assert_close(runs["dense"](ids), runs["transformers, dense"](ids),
                                       rtol=1e-3, atol=1e-3)  # fmt: skip
            times[tokens] = timed(runs, ids, 1 if args.quick else args.turns)
            for peer in ("dense", "transformers, factored", "transformers, dense"):
                shown[f"prompt of {tokens}, beside {peer}"] = Comparison(
                    ours=times[tokens]["ours"], unit="s", peer=times[tokens][peer], peer_name=peer
                )
        shown["graph and weights"] = Comparison(
            ours=sizes["factored"], unit="bytes", peer=sizes["dense"], peer_name="dense"
        )
    part = "demo" if args.quick else folder.name
    save("graphs", part, shown, args, kept=KEPT, seconds=times, dtype="float32")


if __name__ == "__main__":
    main()
