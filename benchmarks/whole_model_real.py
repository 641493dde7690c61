"""A real model at equal size: ours beside the field's methods, calibrated on two kinds of text.

    python benchmarks/whole_model_real.py --model smollm2/ --calibrated own

The model is a folder; the recorded one is SmolLM2-135M-Instruct, de-quantised from four bits. All
matrices of attention and FFN are compressed, `kept` of their numbers stored. Calibrated on the
first 60 % of WikiText-2's test file (own), or on stories, claims and questions (other), with
`--sampled FILE` (of `tensorllm sample`) on what the model wrote too, and distilled, where the
method asks for that, on `--distill-text FILE` alone; scored, in nats per token, on blocks of its
last 40 % and on stories, and zero-shot on the first `--questions` test rows of each of the four
datasets (0: none); claims of fever and questions of hotpotqa may stand in the text (other), so that
these two are not held out there. Each text that is calibrated on, each number of sequences and
each draw of them (`--seed`) is a part of docs/results/whole_model_real.json, written after every
method; what other commands measured with the same model stays there, each row with its commit and
command.
"""

import argparse
import copy
import json
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from support.questions import accuracies
from support.results import RESULTS, Comparison, begin, made, parser, real, save
from support.stored import stored_numbers
from support.whole_model_texts import SCORED, blocks, wikitext
from transformers import AutoModelForCausalLM, AutoTokenizer

from tensorllm.calibration import Calibration, read_calibration
from tensorllm.calibration.fit import fit_sizes, next_token_loss
from tensorllm.calibration.layers import InMemory
from tensorllm.compression.engine import compress
from tensorllm.compressors import COMPRESSORS, ActivationHybrid
from tensorllm.compressors.budget import Budget
from tensorllm.compressors.calibrated.modegpt import MoDeGPT
from tensorllm.compressors.settings import make_compressor
from tensorllm.data.demo import MODEL_DIR

KEPT = (0.8, 0.6, 0.4)
STEPS = 96  # of distillation
BASELINES = (
    *("svd", "asvd", "svd-llm", "svd-llm-sequential", "aa-svd", "modegpt"),
    "modegpt, distilled",
)
OURS: dict[str, dict[str, Any]] = {
    "ours, no refit, no narrowing": {"refit_epochs": 0, "narrowing": False},
    "ours, no refit": {"refit_epochs": 0},
    "ours, no narrowing": {"narrowing": False},
    "ours": {},
    "ours, distilled": {"distill_steps": STEPS},
}
SAMPLED = ", with sampled text"  # ends the name of a method for which the model wrote some
MORE = (", distilled", SAMPLED)  # what a method may have, and is compared with only if ours has it
HALF = 0.5  # of the gap between the best other method and the dense model: what ours is to close


@COMPRESSORS.register("modegpt, distilled")
@dataclass(frozen=True, kw_only=True)
class DistilledMoDeGPT(MoDeGPT):
    """What MoDeGPT left trained as the factors of ours are."""

    @property
    def training_steps(self) -> int:
        return STEPS


class Bench:
    """The model, what it is calibrated and scored on, and the losses so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        folder = MODEL_DIR if args.quick else args.model
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.args = args
        config = self.model.config
        self.spec = InMemory(self.model).roles.spec
        shared = real(args, "data").parent
        own = wikitext(self.tokenizer, shared, config, scored=2 if args.quick else SCORED)
        self.scored = own.scored
        self.texts = {
            "own": own.calibration,
            "other": blocks("\n\n".join(self.other()), self.tokenizer, config),
        }[args.calibrated]
        if args.length is not None:
            self.texts = [
                block[at : at + args.length]
                for block in self.texts
                for at in range(0, len(block) - args.length + 1, args.length)
            ]
        self.losses = earlier(args)

    def other(self) -> list[str]:
        """Stories, claims and questions in turn."""
        stories = json.loads(real(self.args, "data/tinystories_1000.json").read_text())[200:]
        read = {
            "fever_paper_dev": "claim",
            "hotpot_dev": "question",
        }
        texts = [stories]
        for name, field in read.items():
            lines = real(self.args, f"data/{name}.jsonl").read_text().splitlines()[:3000]
            texts.append([str(json.loads(line)[field]) for line in lines])
        return [text for together in zip(*texts, strict=False) for text in together]

    def calibration(self) -> Calibration:
        """The drawn text, and what the model wrote where a file of that is given."""
        draws = torch.Generator().manual_seed(self.args.seed)
        order = torch.randperm(len(self.texts), generator=draws)[: self.args.sequences].tolist()
        drawn = tuple(tuple(self.texts[i]) for i in order)
        text = Calibration(drawn, source=self.args.calibrated, seed=self.args.seed)
        whole = partial(read_calibration, tokenizer=self.tokenizer, sequences=None, length=512)
        if self.args.distill_text is not None:
            text = replace(text, to_distill=whole(self.args.distill_text))
        if self.args.sampled is None:
            return text
        return text.with_all_of(whole(self.args.sampled, length=len(drawn[0])))

    def loss(self, model: Any) -> dict[str, Any]:
        return {
            name: next_token_loss(model, Calibration(tuple(map(tuple, some))).batches())
            for name, some in self.scored.items()
        }

    def answers(self, model: Any) -> dict[str, Any]:
        """The part `questions` of a row: accuracy and loss on each dataset."""
        limit = self.args.questions
        return (
            {"questions": accuracies(model, self.tokenizer, self.args, limit) | {"rows": limit}}
            if limit
            else {}
        )

    def add(self, name: str, kept: float | None, seconds: float, report: Any, model: Any) -> None:
        if self.args.sampled is not None:
            name += SAMPLED
        row = {"method": name, "kept": kept, "seconds": seconds}
        row["parameters"] = stored_numbers(self.spec, report)
        row |= self.loss(model) | self.answers(model)
        row |= {k: made()[k] for k in ("commit", "command")}
        self.losses[f"{name} at {kept}"] = row
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


def earlier(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What the file has of the same model, sequences and seed, by method and size."""
    path = args.out or RESULTS / "whole_model_real.json"
    if args.quick or not path.is_file():
        return {}
    part = json.loads(path.read_text()).get(part_of(args), {})
    asked = {"model": args.model.name, "seed": args.seed}
    if any(part.get(name) != value for name, value in asked.items()):
        return {}
    return {f"{row['method']} at {row['kept']}": row for row in part["rows"]}


def part_of(args: argparse.Namespace) -> str:
    length = f" of {args.length}" if args.length is not None else ""
    another = f", seed {args.seed}" if args.seed else ""
    return f"{args.calibrated}, {args.sequences} sequences{length}{another}"


def run(args: argparse.Namespace) -> None:
    bench = Bench(args)
    text = bench.calibration()
    dense = bench.loss(bench.model)
    dense |= bench.answers(bench.model)
    print({"dense": dense, "tokens": sum(map(len, text.sequences))}, flush=True)
    kept = KEPT[:1] if args.quick else args.kept
    for name in args.methods:
        if name in BASELINES:
            for share in kept:
                one = make_compressor(name, {"kept": share})
                model = copy.deepcopy(bench.model)
                started = time.perf_counter()
                given = None if one.needs == "weights" else text
                report = compress(model, one, calibration=given)
                bench.add(name, share, time.perf_counter() - started, report, model)
                save_all(bench, dense, args)
            continue
        one = ActivationHybrid(target_ratio=2.0, **OURS[name])
        targets = [Budget(target_ratio=1 / share) for share in kept]
        started = time.perf_counter()
        fits = fit_sizes(one, bench.model, text, targets)
        seconds = (time.perf_counter() - started) / len(kept)
        for share, fitted in zip(kept, fits, strict=True):
            model = copy.deepcopy(bench.model)
            report = compress(model, fitted)
            bench.add(name, share, seconds, report, model)
            save_all(bench, dense, args)


def save_all(bench: Bench, dense: dict[str, Any], args: argparse.Namespace) -> None:
    save(
        "whole_model_real",
        part_of(args),
        closed(bench.losses, dense),
        args,
        model=args.model.name,
        sequences=args.sequences,
        seed=args.seed,
        dense=dense,
        rows=list(bench.losses.values()),
    )


def closed(losses: dict[str, dict[str, Any]], dense: dict[str, Any]) -> dict[str, Comparison]:
    """What each variant of ours closes of the gap between the best other method and the dense
    model: another as it is published, and, where ours was given more (`MORE`), one that was given
    the same."""
    out = {}
    for row in (row for row in losses.values() if "ours" in row["method"]):
        given = [more for more in MORE if more in row["method"]]
        others = [
            other
            for other in losses.values()
            if other["kept"] == row["kept"] and "ours" not in other["method"]
        ]
        for which, extra in (("", []), (", given the same", given)):
            peers = [
                other
                for other in others
                if [more for more in MORE if more in other["method"]] == extra
            ]
            if not peers or (which and not given):
                continue
            for text in (name for name in dense if name != "questions"):
                rest = min(other[text] for other in peers)
                share = 100 * (rest - row[text]) / (rest - dense[text])
                name = f"{row['method']}, kept {row['kept']:g}, {text}{which}"
                out[name] = Comparison(ours=share, unit="% of the gap", wanted=100 * HALF)
    return out


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", type=Path, default=Path("smollm2"), help="folder of the model")
    options.add_argument("--calibrated", choices=("own", "other"), default="own")
    options.add_argument("--sequences", type=int, default=64, help="of --length")
    options.add_argument(
        "--length", type=int, help="tokens of a sequence (those scored, if not given)"
    )
    options.add_argument("--sampled", type=Path, help="text that the model wrote, to add")
    options.add_argument("--distill-text", type=Path, help="what is distilled on, such as that")
    options.add_argument("--kept", type=float, nargs="+", default=KEPT)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--questions", type=int, default=200, help="rows of each dataset")
    options.add_argument("--methods", nargs="+", default=[*BASELINES, *OURS])
    args = options.parse_args()
    begin(args)
    if args.quick:
        args.sequences, args.methods, args.questions = 32, ["svd", "svd-llm", "ours"], 4
    elif not args.model.is_dir():
        options.error(f"--model must be a folder, got {args.model}")
    run(args)


if __name__ == "__main__":
    main()
