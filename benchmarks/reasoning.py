"""Does a compression that is fitted to text still denoise? The demo world's questions tell.

    python benchmarks/reasoning.py

Accuracy and answer loss of the embedded demo model on its questions: as it is, after the data-free
hybrid (the shipped recipe), and after activation-tucker and -hybrid, calibrated on what the world
tells in training, noise included; also both in turn: first denoised without data, then all layers
fitted to what the denoised model makes of the text. Per mode and layers a ratio is chosen on the
validation part (the first fifth), the one with the best accuracy, or behind a denoised model the
largest that loses at most a point; its accuracy on the test part is the figure.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from support.results import Comparison, begin, parser, save
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tensorllm.calibration import Calibration, fit
from tensorllm.compression.engine import compress
from tensorllm.compressors import ActivationHybrid, ActivationTucker, Compressor
from tensorllm.compressors.settings import make_compressor
from tensorllm.data.demo import MODEL_DIR, world
from tensorllm.evaluation.evaluate import evaluate_model, make_dataset
from tensorllm.recipes import default_recipe

RATIOS = (1.5, 2.0, 3.0, 5.0, 8.0)
MODES = {"activation-tucker": ActivationTucker, "activation-hybrid": ActivationHybrid}
DENOISED = "hybrid, no data"
LOST = 1.0  # points of accuracy that a smaller denoised model may lose


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

    def __init__(self, count: int, limit: int | None, **settings: Any) -> None:
        self.settings = settings
        self.model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
        self.text = told(self.tokenizer, count)
        self.limit = limit
        self.rows: list[dict[str, Any]] = []

    def add(
        self,
        mode: str,
        compressor: Compressor | None,
        layers: Sequence[int] | None,
        ratio: float | None = None,
        **more: Any,
    ) -> nn.Module:
        """One row; the model that it is about."""
        model, size = copy.deepcopy(self.model), 1.0
        if isinstance(compressor, ActivationTucker):
            compressor = fit(compressor, model, self.text, layers)
        if compressor is not None:
            size = compress(model, compressor, layers).ratios()["whole_model"]
        row = {"mode": mode, "layers": layers, "ratio": ratio, "whole_model": size, **more}
        for split in ("val", "test"):
            data = make_dataset("demo", split=split, limit=self.limit)
            found = evaluate_model(model, self.tokenizer, data, protocol="strict")
            row[split] = {key: found[key] for key in ("accuracy", "loss", "examples")}
        self.rows.append(row)
        print(row, flush=True)
        return model

    def choose(self, mode: str, layers: Sequence[int] | None, ratios: Sequence[float]) -> None:
        """Rows of all ratios, one of them marked."""
        kind = MODES[mode.removeprefix(f"{DENOISED}, then ")]
        for ratio in ratios:
            self.add(mode, kind(target_ratio=ratio, **self.settings), layers, ratio)
        mark(self.rows, mode, layers)


def mark(rows: Sequence[dict[str, Any]], mode: str, layers: Sequence[int] | None) -> None:
    """Choose one of the rows of a mode, by the validation part."""
    same = [r for r in rows if r["mode"] == mode and r["layers"] == layers]
    if mode not in MODES:
        denoised = next(r for r in rows if r["mode"] == DENOISED)
        least = denoised["val"]["accuracy"] - LOST
        same = [r for r in same if r["val"]["accuracy"] >= least] or same[:1]
        same[-1]["chosen"] = True
    else:
        max(same, key=lambda r: r["val"]["accuracy"])["chosen"] = True


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--lessons", type=int, default=1024, help="of the calibration text")
    args = options.parse_args()
    begin(args)
    quick = args.quick
    bench = Bench(128, 64, refit_epochs=1) if quick else Bench(args.lessons, None)
    ratios = RATIOS[-1:] if quick else RATIOS
    bench.add("original", None, None, chosen=True)
    recipe = default_recipe("demo", "hybrid", None)
    assert recipe is not None
    settings = make_compressor(recipe.mode, recipe.settings)
    denoised = bench.add(DENOISED, settings, recipe.layers, chosen=True)
    for layers in [[1]] if quick else (None, [1], [1, 3]):  # all, and those of the recipe
        for mode in MODES:
            bench.choose(mode, layers, ratios)
    bench.model.load_state_dict(denoised.state_dict())
    for mode in MODES:
        bench.choose(f"{DENOISED}, then {mode}", None, ratios)
    calibration = bench.text.facts()
    save("reasoning", "demo", compared(bench.rows), args, calibration=calibration, rows=bench.rows)


def compared(rows: Sequence[dict[str, Any]]) -> dict[str, Comparison]:
    """What was chosen beside the data-free hybrid, on the test part."""
    chosen = [row for row in rows if row.get("chosen")]
    peer = next(row for row in chosen if row["mode"] == DENOISED)
    return {
        f"{row['mode']}, layers {row['layers'] or 'all'}": Comparison(
            ours=row["test"]["accuracy"],
            unit="% right",
            peer=peer["test"]["accuracy"],
            peer_name="data-free hybrid",
            more_is_better=True,
        )
        for row in chosen
        if row["ratio"] is not None
    }


if __name__ == "__main__":
    main()
