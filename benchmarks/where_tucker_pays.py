"""Where a shared Tucker tensor pays on a real model, and where not: the attention of all layers.

    python benchmarks/where_tucker_pays.py --model smollm2/

No data is used to compress: the attention of every layer by `shared-tucker`, by `per-matrix-tucker`
and by plain `svd` of each matrix, at equal numbers, shared out over the layers by relative error.
Scored in nats per token on blocks of WikiText-2's test file. A study of tensor decompositions
(arXiv 2606.03465) found such fronts to collapse early on large models; its code and its models were
not run here.
"""

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from support.results import Comparison, begin, parser, real, save
from transformers import AutoModelForCausalLM, AutoTokenizer

from tensorllm.calibration import Calibration
from tensorllm.calibration.fit import next_token_loss
from tensorllm.compression.engine import compress
from tensorllm.compressors.budget import Budget
from tensorllm.compressors.settings import make_compressor
from tensorllm.data.demo import MODEL_DIR

METHODS: dict[str, dict[str, Any]] = {
    "shared-tucker": {"ranks": (1, 1, 1)},
    "per-matrix-tucker": {"ranks": (1, 1)},
    "svd": {"matrices": ("q", "k", "v", "o"), "kept": 0.5},
}
RATIOS = (1.1, 1.5, 2.0)
LENGTH, BLOCKS = 512, 8


def blocks(tokenizer: Any, text: str, most: int, length: int, words: int) -> Calibration:
    """Sequences spread over a text."""
    ids = [min(i, words - 1) for i in tokenizer(text, add_special_tokens=False).input_ids]
    cut = [tuple(ids[i : i + length]) for i in range(0, len(ids) - length, length)]
    return Calibration(tuple(cut[:: max(1, len(cut) // most)][:most]))


def rows(model: Any, text: Calibration, ratios: tuple[float, ...]) -> Iterator[dict[str, Any]]:
    """Every method at every ratio of the attention."""
    parameters = sum(p.numel() for p in model.parameters())
    for ratio in ratios:
        for name, settings in METHODS.items():
            edited = copy.deepcopy(model)
            one = make_compressor(name, settings)
            report = compress(edited, one, budget=Budget(target_ratio=ratio))
            saved = sum(s.parameters_before - s.parameters_after for s in report.sites)
            row = {
                "method": name,
                "ratio": ratio,
                "saved_of_model": 100 * saved / parameters,
                "loss": next_token_loss(edited, text.batches()),
                "seconds": report.seconds,
            }
            print(row, flush=True)
            yield row


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", type=Path, help="folder of a causal model")
    args = options.parse_args()
    if not args.quick and args.model is None:
        sys.exit("give --model FOLDER")
    begin(args)
    folder = MODEL_DIR if args.quick else args.model
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = min(LENGTH, model.config.max_position_embeddings)
    text = real(args, "data/wikitext2_test.raw").read_text()
    some = blocks(tokenizer, text, 1 if args.quick else BLOCKS, length, model.config.vocab_size)
    dense = next_token_loss(model, some.batches())
    found = list(rows(model, some, RATIOS[:1] if args.quick else RATIOS))
    losses = {(row["method"], row["ratio"]): row["loss"] for row in found}
    shown = {
        f"shared-tucker at {ratio:g}": Comparison(
            ours=losses["shared-tucker", ratio],
            unit="nats per token",
            peer=losses["svd", ratio],
            peer_name="svd",
        )
        for ratio in dict.fromkeys(row["ratio"] for row in found)
    }
    name = "demo" if args.quick else args.model.name
    save(
        "where_tucker_pays", name, shown, args, dense=dense, blocks=len(some.sequences), rows=found
    )


if __name__ == "__main__":
    main()
