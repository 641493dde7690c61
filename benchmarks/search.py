"""`python benchmarks/search.py`: the rank search against the loops it replaces, in one run.

A GPT-J model (width 512, 12 layers), 48 trials of shared Tucker ranks over its last four layers,
real questions: FEVER's rows in --shared, cut by the tokenizer of tinystories-656K there (--quick:
the demo world's). The weights are random, but not shapeless: the attention's spectra decay as those
of trained models do, and the readout is fitted to the questions, so that ranks matter for the
answers. Three ways, side by side:

- naive: reload the model, decompose with tensorly, one example at a time (on a sample of trials and
  of examples, scaled to all of them; its verdicts are compared with the search's);
- batched: reload, tensorllm's decomposition and batched evaluation, nothing reused (on a sample of
  trials, scaled; its metrics are compared with the search's);
- search: as `search-ranks` does it, losing trials given up early, and once more with each of them
  examined in full.
"""

import argparse
import copy
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import tensorly
import torch
from results import Comparison, begin, parser, real, save
from search_model import make_model, write_attention
from tensorly.decomposition import partial_tucker
from transformers import AutoTokenizer, GPTJForCausalLM

from tensorllm.architectures import RoleMatrices, parameters_of
from tensorllm.compression.model import compress
from tensorllm.data.base import ReasoningDataModule
from tensorllm.data.demo import MODEL_DIR
from tensorllm.evaluation.evaluate import evaluate_model, make_dataset
from tensorllm.evaluation.protocol import PROTOCOLS
from tensorllm.search.examiner import Examiner, Found, unpack
from tensorllm.search.kept import Budget
from tensorllm.search.prefix import default_budget
from tensorllm.search.space import Point, make_space
from tensorllm.search.stopping import Rival
from tensorllm.search.worker import merit
from tensorllm.tensors.stacking import ATTENTION, STACKINGS

TRIALS, LAYERS = 48, (8, 9, 10, 11)
FEVER, TOKENIZER = "data/fever_paper_dev.jsonl", "models/tinystories-656K"
WANTED = (30.0, 5.0)  # times faster than the naive and the batched loop


def arguments() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--questions", type=int, default=400)
    options.add_argument("--trials", type=int, default=TRIALS)
    options.add_argument("--naive-trials", type=int, default=2)
    options.add_argument("--naive-examples", type=int, default=20)
    options.add_argument("--batched-trials", type=int, default=3)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--folder", type=Path, help="of the model; a temporary one otherwise")
    args = options.parse_args()
    if args.quick:
        args.trials, args.questions, args.naive_examples, args.batched_trials = 4, 24, 4, 1
    return args


def dataset(args: argparse.Namespace, tokenizer: object) -> ReasoningDataModule:
    """The questions: the first ones of a real file, or the demo world's."""
    name, file = ("demo", None) if args.quick else ("fever", real(args, FEVER))
    data = make_dataset(name, data_file=file, split="all", limit=args.questions)
    data.connect(tokenizer)  # type: ignore[arg-type]
    return data


def naive_edit(model: GPTJForCausalLM, point: Point) -> None:
    """What the authors do: stack the heads, tensorly's partial_tucker, write back."""
    roles = RoleMatrices(model.config, parameters_of(model))
    stacking = STACKINGS["heads"]
    weights = parameters_of(model)
    for layer in point.layers:
        w = stacking.stack([roles.read(weights, layer, r) for r in ATTENTION], roles.geometry)
        with tensorly.backend_context("pytorch"):
            (core, factors), _ = partial_tucker(
                w, rank=list(point.settings["ranks"]), modes=[0, 1, 2], init="svd", tol=1e-5
            )
            near = tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1, 2])
        write_attention(roles, weights, layer, near)


def one_by_one(model: GPTJForCausalLM, tokenizer: object, data: ReasoningDataModule) -> list[bool]:
    """Verdicts, one example and one choice at a time: the likeliest answer's tokens."""
    verdicts = []
    for example in data.examples:
        scores = []
        for choice in example.choices or (example.answer,):
            prompt = tokenizer(example.prompt)["input_ids"]  # type: ignore[operator]
            whole = tokenizer(f"{example.prompt} {choice}")["input_ids"]  # type: ignore[operator]
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            answer = range(len(prompt), len(whole))
            scores.append(sum(float(logits[i - 1, whole[i]]) for i in answer))
        best = scores.index(max(scores))
        verdicts.append(bool(example.choices) and example.choices[best] == example.answer)
    return verdicts


def timed_naive(  # type: ignore[no-untyped-def]
    args, folder, tokenizer, data, points, known: list[list[bool]]
) -> tuple[float, int]:
    """Seconds for all trials and examples, from a sample of both, and verdicts that differ.

    Args:
        known: the search's verdicts on every example, per point.
    """
    few = copy.copy(data)
    few._examples = data.examples[: args.naive_examples]
    fixed = running = 0.0
    different = 0
    for point, verdicts in sample(list(zip(points, known, strict=True)), args.naive_trials):
        started = time.perf_counter()
        model = GPTJForCausalLM.from_pretrained(folder).eval()
        naive_edit(model, point)
        middle = time.perf_counter()
        found = one_by_one(model, tokenizer, few)
        fixed, running = fixed + middle - started, running + time.perf_counter() - middle
        different += sum(a != b for a, b in zip(found, verdicts, strict=False))
    running *= len(data.examples) / len(few.examples)
    return (fixed + running) / args.naive_trials * len(points), different


def sample(items: list[Any], count: int) -> list[Any]:
    """So many of them, evenly spread."""
    return [items[n * len(items) // count] for n in range(count)]


def verdicts_of(examiner: Examiner, found: Found) -> list[bool]:
    """In the order of the dataset, not of the examination."""
    pairs = zip(examiner.order, unpack(found.correct, found.seen), strict=True)
    return [verdict for _, verdict in sorted((e.index, verdict) for e, verdict in pairs)]


def in_turn(examiner: Examiner, points: list[Point]) -> list[Found]:
    """Every point against the best one before it, given up when it has lost."""
    found: list[Found] = []
    for point in points:
        best = best_of(found)
        rival = None
        if best is not None:
            rival = Rival(unpack(found[best].correct, found[best].seen), found[best].loss)
        found.append(examiner(point, rival, level=0.001))
    return found


def best_of(found: list[Found]) -> int | None:
    """The place of the best one of those examined in full."""
    full = [i for i, f in enumerate(found) if not f.stopped]
    return min(full, key=lambda i: merit(found[i], "accuracy"), default=None)


def main() -> None:
    """Measure, print and save."""
    args = arguments()
    begin(args)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        words = MODEL_DIR if args.quick else real(args, TOKENIZER)
        tokenizer = AutoTokenizer.from_pretrained(words)
        data = dataset(args, tokenizer)
        if not (folder / "config.json").exists():
            fitted = None if args.quick else data
            make_model(folder, tokenizer, fitted, args.seed, 256 if args.quick else 512)
        model = GPTJForCausalLM.from_pretrained(folder).eval()
        roles = RoleMatrices(model.config, parameters_of(model))
        space = make_space(roles, "shared-tucker", layers=LAYERS)
        grid = [space.point(values) for values in space.grid]
        points = random.Random(args.seed).sample(grid, args.trials)
        points.sort(key=lambda point: -point.layers[0])
        options = {"max_new_tokens": data.max_new_tokens, "points": points, "seed": args.seed}

        def examiner() -> Examiner:  # a new one knows nothing: nothing is decomposed or kept yet
            return Examiner(
                model, tokenizer, data.examples, PROTOCOLS["strict"],
                budget=Budget(default_budget(model.device)), **options,
            )  # fmt: skip

        seconds: dict[str, float] = {}
        started = time.perf_counter()
        early = in_turn(examiner(), points)
        seconds["search"] = time.perf_counter() - started
        started = time.perf_counter()
        examine = examiner()
        full = [examine(point) for point in points]
        seconds["search in full"] = time.perf_counter() - started

        started = time.perf_counter()
        differences = []
        for point, found in sample(list(zip(points, full, strict=True)), args.batched_trials):
            fresh = GPTJForCausalLM.from_pretrained(folder).eval()
            compress(fresh, point.compressor, point.layers)
            plain = evaluate_model(fresh, tokenizer, data)
            differences.append([plain["accuracy"] - found.accuracy, plain["loss"] - found.loss])
        batched = (time.perf_counter() - started) / args.batched_trials
        seconds["batched"] = batched * len(points)
        known = [verdicts_of(examine, found) for found in full]
        seconds["naive"], different = timed_naive(args, folder, tokenizer, data, points, known)

    about = {
        "seconds": seconds,
        "given_up": sum(found.stopped for found in early),
        "same_winner": best_of(early) == best_of(full),
        "accuracies": {
            "least": min(f.accuracy for f in full),
            "most": max(f.accuracy for f in full),
        },
        "largest_difference_accuracy_points": max(abs(a) for a, _ in differences),
        "largest_difference_loss": max(abs(b) for _, b in differences),
        "verdicts_that_differ_from_naive": different,
        "verdicts_compared": args.naive_trials * min(args.naive_examples, len(data.examples)),
        "trials": len(points),
        "questions": len(data.examples),
        "dataset": data.name,
    }
    save("search", "cpu", comparisons(seconds, args.quick), args, **about)


def comparisons(seconds: dict[str, float], quick: bool) -> dict[str, Comparison]:
    """All trials by the search, beside what the loops would take for them."""
    wanted = (None, None) if quick else WANTED
    out = {}
    for ours, how in (("search", ""), ("search in full", ", none given up early")):
        for peer, want in zip(("naive", "batched"), wanted, strict=True):
            out[f"all trials{how}, beside {peer}"] = Comparison(
                ours=seconds[ours], unit="s", peer=seconds[peer], peer_name=peer, wanted=want
            )
    return out


if __name__ == "__main__":
    main()
