"""Fine-tuning after compression: nats that a held-out text gets back per minute of processor time.

    python benchmarks/finetune.py --shared SHARED                        # tinystories-656K
    python benchmarks/finetune.py --shared SHARED --model smollm2/ --text wikitext --steps 12

All matrices at ratio 2, by `activation-hybrid` (ours) and by `svd-llm` (its peer), each of which
runs in its factors and is trained in two ways by Lightning's Trainer: the factors themselves, and
LoRA (peft, rank 8) on every factor, as SVD-LLM's authors do. Same text, sequences, steps and
schedule. The learning rate of each way is the best of some on a validation text; what is reported
is the mean over seeds, which draw the order of the text and LoRA's first numbers, on a third text.
Time is that of all threads in the Trainer, with data and optimizer, without choosing a rate.
The last model of each way is then saved, adapters merged, and loaded in its factors and dense:
`apart` is how far the losses of four sequences are from those of the model in memory, at most.
"""

import argparse
import copy
import json
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from support.results import Comparison, begin, parser, real, save
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import tensorllm as tl
from tensorllm.calibration import Calibration, fit
from tensorllm.compressors import SVDLLM, ActivationHybrid
from tensorllm.data.demo import MODEL_DIR

RATIO, RANK = 2.0, 8
PEER = "SVD-LLM, LoRA"


class FineTuning(LightningModule):
    """The next-token loss of a model, AdamW on what requires gradients, warm-up and cosine."""

    def __init__(self, model: Any, rate: float, steps: int) -> None:
        super().__init__()
        self.model, self.rate, self.steps = model, rate, steps

    def training_step(self, ids_BT: Tensor, index: int) -> Tensor:
        loss: Tensor = self.model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        return loss

    def configure_optimizers(self) -> Any:
        wanted = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(wanted, lr=self.rate, weight_decay=0.0)
        warm = max(1, self.steps // 10)

        def share(step: int) -> float:
            rest = (step - warm) / max(1, self.steps - warm)
            return (step + 1) / warm if step < warm else (1 + math.cos(math.pi * rest)) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def factors(model: Any) -> Any:
    """The factors themselves are trained."""
    tl.train_only_factors(model)
    return model


def lora(model: Any) -> Any:
    """LoRA on every linear, which after a compression of all matrices are the factors' own."""
    import peft

    settings = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    return peft.get_peft_model(model, settings)


WAYS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "ours, factors": ("activation-hybrid", factors),
    "ours, LoRA": ("activation-hybrid", lora),
    "SVD-LLM, factors": ("svd-llm", factors),
    PEER: ("svd-llm", lora),
}


class Bench:
    """The model, three texts of equally long sequences, and the compressed models."""

    def __init__(self, args: argparse.Namespace) -> None:
        folder = MODEL_DIR if args.quick else args.model
        self.args = args
        self.dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.length = min(args.length, self.dense.config.max_position_embeddings)
        blocks = self.blocks(AutoTokenizer.from_pretrained(folder))
        count = args.held_out
        self.held_out, self.validation, self.training = (
            blocks[-count:], blocks[-2 * count : -count], blocks[: -2 * count],
        )  # fmt: skip
        self.compressed = {name: self.compress(name) for name in ("activation-hybrid", "svd-llm")}

    def blocks(self, tokenizer: Any) -> list[Tensor]:
        if self.args.text == "stories":
            rows = json.loads(real(self.args, "data/tinystories_1000.json").read_text())
            text = "\n\n".join(rows[:100] if self.args.quick else rows)
        else:
            text = real(self.args, "data/wikitext2_test.raw").read_text()
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        ids = ids.clamp(max=self.dense.config.vocab_size - 1)  # the demo's knows few words
        return list(ids.split(self.length)[:-1])

    def compress(self, mode: str) -> Any:
        """The model in its factors, fitted to the beginning of the text that it is trained on."""
        rows = tuple(tuple(row.tolist()) for row in self.training[: self.args.sequences])
        text = Calibration(rows, source=self.args.text, seed=0)
        model = copy.deepcopy(self.dense)
        refit = self.args.refit_epochs
        modes = {
            "activation-hybrid": lambda: ActivationHybrid(target_ratio=RATIO, refit_epochs=refit),
            "svd-llm": lambda: SVDLLM(kept=1 / RATIO),
        }
        started = time.process_time()
        tl.compress(model, fit(modes[mode](), model, text))
        tl.factorize(model)
        print(f"{mode}: {time.process_time() - started:.0f} s of processor time", flush=True)
        return model.eval()

    @torch.inference_mode()
    def losses(self, model: Any, blocks: Sequence[Tensor]) -> Tensor:
        """Nats per token of each sequence."""
        model.eval()
        return torch.stack([model(ids[None], labels=ids[None]).loss for ids in blocks])

    def train(self, way: str, rate: float, seed: int) -> tuple[Any, float, int]:
        """A trained model, the seconds of processor time, and how many numbers were trained."""
        mode, prepare = WAYS[way]
        seed_everything(seed, verbose=False)
        model = prepare(copy.deepcopy(self.compressed[mode])).train()
        draws = torch.Generator().manual_seed(seed)
        loader: Any = DataLoader(
            self.training,
            self.args.batch,
            shuffle=True,
            drop_last=True,
            generator=draws,  # type: ignore[arg-type]
        )
        trainer = Trainer(
            max_steps=self.args.steps, max_epochs=-1, accelerator="cpu", gradient_clip_val=1.0,
            logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        started = time.process_time()
        trainer.fit(FineTuning(model, rate, self.args.steps), loader)
        seconds = time.process_time() - started
        return model, seconds, sum(p.numel() for p in model.parameters() if p.requires_grad)


def handed_over(bench: Bench, model: Any) -> dict[str, float]:
    """How far losses are, at most, after each step from a trained model to a dense one."""
    blocks = bench.held_out[:4]
    want = bench.losses(model, blocks)
    found = {}
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
        found["merged"] = model
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found["loaded"] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        found["dense"] = tl.load(folder, dtype=torch.float32)
        return {
            name: float((bench.losses(m, blocks) - want).abs().max()) for name, m in found.items()
        }


def measure(bench: Bench, way: str, rates: Sequence[float]) -> dict[str, Any]:
    """One way at its best rate: losses before and after by seed, seconds, and their spread."""
    tried = {}
    for rate in rates if len(rates) > 1 else ():
        model, *_ = bench.train(way, rate, bench.args.seeds)  # a seed of its own
        tried[rate] = bench.losses(model, bench.validation).mean().item()
    rate = min(tried, key=lambda one: tried[one]) if tried else rates[0]
    before = bench.losses(bench.compressed[WAYS[way][0]], bench.held_out)
    runs = []
    for seed in range(bench.args.seeds):
        model, seconds, trained = bench.train(way, rate, seed)
        gained = before - bench.losses(model, bench.held_out)
        error = gained.std().item() / math.sqrt(len(gained))
        runs.append({"seed": seed, "seconds": seconds, "gained": gained.mean().item()})
        runs[-1] |= {"standard_error": error, "per_minute": 60 * runs[-1]["gained"] / seconds}
        print(way, rate, {k: round(v, 4) for k, v in runs[-1].items()}, flush=True)
    found = {"rate": rate, "validation": tried, "trained": trained, "runs": runs}
    found["apart"] = handed_over(bench, model)
    print(way, "apart:", found["apart"], flush=True)
    found["before"] = before.mean().item()
    found["after"] = found["before"] - statistics.mean(run["gained"] for run in runs)
    for name in ("gained", "per_minute", "seconds"):
        values = [run[name] for run in runs]
        found[name] = {"mean": statistics.mean(values)}
        found[name]["sd"] = statistics.stdev(values) if len(values) > 1 else None
    return found


def compared(found: dict[str, dict[str, Any]]) -> dict[str, Comparison]:
    """Each way beside the peer: how fast it gains, and where it ends."""
    out, peer = {}, found[PEER]
    for way, mine in found.items():
        if way != PEER:
            out[f"{way}: recovered"] = Comparison(
                ours=mine["per_minute"]["mean"], peer=peer["per_minute"]["mean"], peer_name=PEER,
                unit="nats/min", more_is_better=True,
            )  # fmt: skip
            out[f"{way}: loss after"] = Comparison(
                ours=mine["after"], peer=peer["after"], peer_name=PEER, unit="nats"
            )
    return out


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", type=Path, help="folder (default: tinystories-656K of SHARED)")
    options.add_argument("--text", choices=("stories", "wikitext"), default="stories")
    options.add_argument("--steps", type=int, default=150)
    options.add_argument("--batch", type=int, default=8, help="sequences of a step")
    options.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    options.add_argument("--sequences", type=int, default=128, help="to fit to")
    options.add_argument("--held-out", type=int, default=100, help="sequences that are scored")
    options.add_argument("--refit-epochs", type=int, default=4, help="of activation-hybrid")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--factor-rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    options.add_argument("--lora-rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    args = options.parse_args()
    begin(args)
    if find_spec("peft") is None:
        options.error("this needs peft: pip install 'tensorllm[peft]'")
    if args.quick:
        args.steps, args.batch, args.length, args.sequences, args.seeds = 8, 4, 32, 64, 1
        args.refit_epochs = 1
        args.held_out, args.factor_rates, args.lora_rates = 16, [3e-3], [1e-2]
    else:
        args.model = args.model or real(args, "models/tinystories-656K")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(lightning|peft)\.")
    bench = Bench(args)
    rates = {factors: args.factor_rates, lora: args.lora_rates}
    found = {way: measure(bench, way, rates[prepare]) for way, (_, prepare) in WAYS.items()}
    about = {
        name: getattr(args, name)
        for name in ("text", "steps", "batch", "sequences", "refit_epochs", "held_out", "seeds")
    }
    dense = bench.losses(bench.dense, bench.held_out)
    save(
        "finetune",
        "quick" if args.quick else args.model.name,
        compared(found),
        args,
        **about,
        length=bench.length,
        rank=RANK,
        dtype="float32",
        dense=dense.mean().item(),
        ways=found,
    )


if __name__ == "__main__":
    main()
