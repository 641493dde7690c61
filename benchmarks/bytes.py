"""Loss at equal bytes of a model's files: a target in bytes beside rounded weights.

    python benchmarks/bytes.py                      # tinystories-656K
    python benchmarks/bytes.py --model smollm2/ --drawn 16 --draws 1 --targets int4 "0.7 of int4"

Each model is a part of docs/results/bytes.json; `--model` is a folder of LLaMA's architecture.
Peers: every attention and FFN matrix rounded to the nearest in int8 or int4 (mode `rounded`), and
by GPTQ (arXiv 2210.17323) in float64 numpy, written here; all in groups of 64, each with a scale in
the dtype of the model, so that their files are as large. Ours: `--target-bytes` of these files'
sizes, rounded up to the next 1,000, of one in the middle and of smaller ones, by
`activation-hybrid`, fitted to the same text as GPTQ, and by `svd`, which sees no text. Embeddings
and norms are in all files as they were stored, and counted. tinystories-656K is fitted to stories
and scored on others; `--model` is fitted to blocks of WikiText-2 and scored on others.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.results import Comparison, begin, parser, real, save
from support.whole_model_texts import stories, wikitext
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import tensorllm as tl
from tensorllm.calibration import Calibration
from tensorllm.calibration.smallest import next_token_loss
from tensorllm.compression.engine import compress_folder
from tensorllm.compression.task import FolderTask
from tensorllm.compressors import ActivationHybrid, PlainSVD, Rounded
from tensorllm.compressors.budget import Budget
from tensorllm.errors import UserError
from tensorllm.tensors.quantised import quantise_tensor

MODEL = "models/tinystories-656K"
TOGETHER = (  # linears that read the same input, in the order in which they run
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
GROUP, DAMPING = 64, 0.01
# Sizes of ours: int8's, the middle, int4's, and shares of what int4's matrices take in the file.
SMALLER = (0.85, 0.7)


def rounded(w_YG: np.ndarray, scale_Y1: np.ndarray, bits: int) -> np.ndarray:
    most = 2 ** (bits - 1)
    return np.clip(np.round(w_YG / scale_Y1), -most, most - 1) * scale_Y1


def gptq(w_YX: np.ndarray, covariance_XX: np.ndarray, bits: int) -> np.ndarray:
    """The paper's Algorithm 1: inputs one after the other, what is lost put into later ones.

    Groups of inputs share a scale for each output, taken when the group's turn comes.
    """
    w_YX, out_YX = w_YX.copy(), np.zeros_like(w_YX)
    size = len(covariance_XX)
    damped_XX = covariance_XX + DAMPING * covariance_XX.diagonal().mean() * np.eye(size)
    root_XX = np.linalg.cholesky(np.linalg.inv(damped_XX)).T
    for x in range(size):
        if x % GROUP == 0:
            group_YG = w_YX[:, x : x + GROUP]
            highest_Y1 = np.abs(group_YG).max(1, keepdims=True)
            scale_Y1 = np.maximum(highest_Y1 / (2 ** (bits - 1) - 0.5), 1e-12)
        out_YX[:, x] = rounded(w_YX[:, x : x + 1], scale_Y1, bits)[:, 0]
        lost_Y = (w_YX[:, x] - out_YX[:, x]) / root_XX[x, x]
        w_YX[:, x + 1 :] -= np.outer(lost_Y, root_XX[x, x + 1 :])
    return out_YX


class Bench:
    """The model, the stories, and what each way makes of them."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.source, self.work = args.model or real(args, MODEL), work
        tokenizer, shared = AutoTokenizer.from_pretrained(self.source), real(args, "data").parent
        config = AutoConfig.from_pretrained(self.source)
        self.width = config.dtype.itemsize  # bytes of a number, and of a group's scale
        if args.model is None:
            self.texts, self.read = stories(tokenizer, shared), "stories"
        else:
            self.texts, self.read = wikitext(tokenizer, shared, config), "wikitext"
        scored = self.texts.scored[self.read][: 4 if args.quick else None]
        self.scored = Calibration(tuple(map(tuple, scored))).batches()
        self.drawn = 8 if args.quick else args.drawn

    def model(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32).eval()

    def text(self, draw: int) -> Calibration:
        order = torch.randperm(
            len(self.texts.calibration), generator=torch.Generator().manual_seed(draw)
        )
        rows = [tuple(self.texts.calibration[i]) for i in order[: self.drawn].tolist()]
        return Calibration(tuple(rows), source=self.read, seed=draw)

    @torch.inference_mode()
    def loss(self, model: Any) -> float:
        return next_token_loss(model, self.scored)

    def written(self, strategy: Any, **more: Any) -> tuple[int, float]:
        """Bytes of the file, and the loss of what it holds."""
        target = self.work / "out"
        task = FolderTask(
            source=self.source, target=target, compressor=strategy, overwrite=True,
            format="factored", **more,
        )  # fmt: skip
        compress_folder(task)
        size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
        return size, self.loss(tl.load(target, dtype=torch.float32))

    @torch.inference_mode()
    def gptq(self, draw: int, bits: int) -> float:
        """The loss after GPTQ, layer by layer, each on what the rounded layers below give it."""
        model, rows = self.model(), self.text(draw).sequences
        calls = [first_call(model, row) for row in rows]  # of the layer whose turn it is
        for block in model.model.layers:
            for together in TOGETHER:
                linears = [block.get_submodule(path) for path in together]
                sums: list[np.ndarray] = []

                def seen(_: Any, given: Any, sums: list[np.ndarray] = sums) -> None:
                    x_NX = given[0].flatten(0, -2).double().numpy()
                    sums.append(x_NX.T @ x_NX)

                hook = linears[0].register_forward_pre_hook(seen)
                for hidden_BTD, more in calls:
                    block(hidden_BTD, **more)
                hook.remove()
                covariance_XX = np.sum(sums, 0) / sum(map(len, rows))
                for linear in linears:
                    w_YX = gptq(linear.weight.double().numpy(), covariance_XX, bits)
                    linear.weight.copy_(torch.from_numpy(w_YX))
            calls = [(block(hidden_BTD, **more), more) for hidden_BTD, more in calls]
        return self.loss(model)


class Reached(Exception):
    """The layer that was waited for; nothing behind it is run."""


def first_call(model: Any, row: Sequence[int]) -> tuple[Tensor, dict[str, Any]]:
    """What the first layer is called with: hidden states, and the rest by name."""
    found: list[tuple[Tensor, dict[str, Any]]] = []

    def seen(_: Any, args: Any, more: dict[str, Any]) -> None:
        found.append((args[0], more))
        raise Reached

    hook = model.model.layers[0].register_forward_pre_hook(seen, with_kwargs=True)
    with suppress(Reached):
        model(torch.tensor([row]), use_cache=False)
    hook.remove()
    return found[0]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", type=Path, help="folder of a model, in place of tinystories")
    options.add_argument("--targets", nargs="+", help="some of the sizes, such as int4")
    options.add_argument("--draws", type=int, default=3, help="of the calibration text")
    options.add_argument("--drawn", type=int, default=64, help="stories or blocks of a draw")
    args = options.parse_args()
    begin(args)
    draws = range(1 if args.quick else args.draws)
    try:
        quantise_tensor(torch.zeros(64, 16), 8)
    except UserError as error:  # torchao is not installed
        sys.exit(str(error))
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(args, Path(work))
        wanted = ["int4"] if args.quick else args.targets
        for rows, about in measured(bench, draws, wanted):
            save("bytes", bench.source.name, comparisons(rows), args, rows=rows, **about)


def measured(
    bench: Bench, draws: range, wanted: Sequence[str] | None
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """By target: bytes, and losses by method; and facts of the model; after every target."""
    dense = sum(path.stat().st_size for path in bench.source.glob("*.safetensors"))
    model = bench.model()
    about: dict[str, Any] = {
        "dense_bytes": dense,
        "dense": bench.loss(model),
        "draws": len(draws),
        "drawn": bench.drawn,
        "read": bench.read,
    }
    plain = {how: bench.written(Rounded(bits=bits)) for how, bits in (("int8", 8), ("int4", 4))}
    sizes = {how: size for how, (size, _) in plain.items()}
    numbers = sum(p.numel() for n, p in model.named_parameters() if n.endswith("proj.weight"))
    # From int4 to int8 a number takes half a byte more; groups have scales beside.
    matrices = (sizes["int8"] - sizes["int4"]) + numbers * bench.width / GROUP
    sizes["middle"] = sum(sizes.values()) // 2
    for share in SMALLER:
        sizes[f"{share:g} of int4"] = int(sizes["int4"] - (1 - share) * matrices)
    rows: dict[str, Any] = {}
    for name, size in sizes.items():
        if wanted is not None and name not in wanted:
            continue
        size = -(-size // 1000) * 1000
        row: dict[str, Any] = {"bytes": size, "losses": {}, "sizes": {}}
        if name in plain:
            row["losses"]["nearest"], row["sizes"]["nearest"] = [plain[name][1]], [plain[name][0]]
            bits = int(name.removeprefix("int"))
            row["losses"]["gptq"] = [bench.gptq(draw, bits) for draw in draws]
        held, loss = bench.written(PlainSVD(rank=1), budget=Budget(target_bytes=size))
        row["losses"]["svd"], row["sizes"]["svd"] = [loss], [held]
        ours = [
            bench.written(ActivationHybrid(target_bytes=size), calibration=bench.text(draw))
            for draw in draws
        ]
        row["losses"]["ours"] = [loss for _, loss in ours]
        row["sizes"]["ours"] = [held for held, _ in ours]
        row["mean"] = {way: statistics.mean(found) for way, found in row["losses"].items()}
        assert max(held for every in row["sizes"].values() for held in every) <= size
        print(name, row, flush=True)
        rows[name] = row
        yield rows, about


def comparisons(rows: dict[str, Any]) -> dict[str, Comparison]:
    """Ours beside each peer of the same size, whoever wins."""
    peers = {"nearest": "rounded to nearest", "gptq": "GPTQ", "svd": "a target without text"}
    return {
        f"{name}, {row['bytes']} bytes, beside {peers[way]}": Comparison(
            ours=row["mean"]["ours"],
            unit="nats per token",
            peer=loss,
            peer_name=peers[way],
        )
        for name, row in rows.items()
        for way, loss in row["mean"].items()
        if way != "ours"
    }


if __name__ == "__main__":
    main()
