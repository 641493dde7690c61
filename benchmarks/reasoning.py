"""Does a compression that is fitted to text still denoise? The demo world's questions tell.

    python benchmarks/reasoning.py --out docs/results/reasoning.json

Accuracy and answer loss of the embedded demo model on the test part of its questions: as it is,
after the data-free hybrid (the shipped recipe), and after activation-tucker and -hybrid, calibrated
on what the world tells in training, noise included. Per mode and layers the ratio with the best
accuracy on the validation part (the first fifth) is marked; the test part is what counts.
"""

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tensorllm.calibration import Calibration, fit
from tensorllm.compression.model import compress
from tensorllm.compressors import ActivationHybrid, ActivationTucker, Compressor
from tensorllm.compressors.settings import make_compressor
from tensorllm.data.demo import MODEL_DIR, world
from tensorllm.environment import environment
from tensorllm.evaluation.evaluate import evaluate_model, make_dataset
from tensorllm.recipes import default_recipe

RATIOS = (1.5, 2.0, 3.0, 5.0, 8.0)
MODES = {"activation-tucker": ActivationTucker, "activation-hybrid": ActivationHybrid}


def told(tokenizer: Any, count: int, seed: int = 0) -> Calibration:
    """Lessons as the world tells them: a generic word in place of the answer as often as there."""
    lessons = world.make_world(world.PEOPLE, world.SEED).told
    draws = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lessons), generator=draws)[:count].tolist()
    noisy = (torch.rand(count, generator=draws) < world.NOISE).tolist()
    lines = [
        f"{lessons[i].prompt} {lessons[i].generic if n else lessons[i].answer}"
        for i, n in zip(order, noisy, strict=True)
    ]
    return Calibration(tuple(tuple(tokenizer(line).input_ids) for line in lines), "told", seed)


class Bench:
    """The demo model, its questions, and the rows found."""

    def __init__(self, count: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
        self.text = told(self.tokenizer, count)
        self.rows: list[dict[str, Any]] = []

    def add(
        self,
        mode: str,
        compressor: Compressor | None,
        layers: Sequence[int] | None,
        ratio: float | None = None,
    ) -> None:
        model, size = copy.deepcopy(self.model), 1.0
        if isinstance(compressor, ActivationTucker):
            compressor = fit(compressor, model, self.text, layers)
        if compressor is not None:
            size = compress(model, compressor, layers).ratios()["whole_model"]
        row = {"mode": mode, "layers": layers, "ratio": ratio, "whole_model": size}
        for split in ("val", "test"):
            data = make_dataset("demo", split=split)  # type: ignore[arg-type]
            found = evaluate_model(model, self.tokenizer, data, protocol="strict")
            row[split] = {key: found[key] for key in ("accuracy", "loss", "examples")}
        self.rows.append(row)
        print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lessons", type=int, default=1024, help="of the calibration text")
    parser.add_argument("--out", type=Path, default=Path("docs/results/reasoning.json"))
    args = parser.parse_args()
    bench = Bench(args.lessons)
    bench.add("original", None, None)
    recipe = default_recipe("demo", "hybrid", None)
    assert recipe is not None
    bench.add("hybrid, no data", make_compressor(recipe.mode, recipe.settings), recipe.layers)
    for layers in (None, [1], [1, 3]):  # all, and those of the recipe
        for mode, kind in MODES.items():
            for ratio in RATIOS:
                bench.add(mode, kind(target_ratio=ratio), layers, ratio)
            same = [r for r in bench.rows if r["mode"] == mode and r["layers"] == layers]
            max(same, key=lambda r: r["val"]["accuracy"])["chosen"] = True
    result = {"calibration": bench.text.facts(), "rows": bench.rows, "environment": environment()}
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
