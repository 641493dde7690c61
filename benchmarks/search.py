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

`--model FOLDER` measures something else: trials of a model on disk on wikidata_qa, whose answers
are generated, beside the same trials with every answer generated anew
(`support/search_answers.py`).

`--beside FILE` runs a search beside an older release's: FILE is what

    python benchmarks/support/counted_search.py search-ranks ... > FILE

printed in an environment with that release; the same command is then run here, unless a second
file has what it printed here, and a third what it printed here with `--flops`.
"""

import argparse
import copy
import random
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from support.results import Comparison, begin, parser, real, save
from support.search_answers import answers
from support.search_beside import beside
from support.search_model import make_model
from support.search_naive import naive_edit, one_by_one
from transformers import AutoTokenizer, GPTJForCausalLM

from tensorllm.compression.engine import compress
from tensorllm.data.base import ReasoningDataModule
from tensorllm.data.demo import MODEL_DIR
from tensorllm.evaluation.evaluate import evaluate_model, make_dataset
from tensorllm.evaluation.protocol import PROTOCOLS
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.options import layers
from tensorllm.search.activation_cache import CacheBudget
from tensorllm.search.examiner import Examiner
from tensorllm.search.objectives import OBJECTIVES
from tensorllm.search.prefix import default_budget
from tensorllm.search.space import Point, make_space
from tensorllm.search.staged import DatasetExamples
from tensorllm.search.stopping import rivals_of
from tensorllm.search.trial import TrialResult, unpack

TRIALS, LAYERS = 48, (8, 9, 10, 11)
WIKIDATA = "data/qa_wikidata.jsonl"
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
    options.add_argument("--model", type=Path, help="measure trials with generated answers")
    options.add_argument("--mode", default="laser", choices=("laser", "shared-tucker"))
    options.add_argument("--layers", default="18-29", help="of --model, as search-ranks has it")
    options.add_argument(
        "--beside", type=Path, nargs="+", help="what an older release's search printed (and ours)"
    )
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


class Given(NamedTuple):
    """What all ways begin with: a checkpoint and its model, questions, and the points to try."""

    folder: Path
    model: GPTJForCausalLM
    tokenizer: Any
    data: ReasoningDataModule
    points: list[Point]
    seed: int

    def examiner(self) -> Examiner:
        """A new one knows nothing: nothing is decomposed or kept yet."""
        return Examiner(
            self.model, self.tokenizer,
            [DatasetExamples(self.data.examples, self.data.max_new_tokens)],
            PROTOCOLS["strict"], points=self.points, seed=self.seed,
            budget=CacheBudget(default_budget(self.model.device)),
        )  # fmt: skip


def prepared(folder: Path, args: argparse.Namespace) -> Given:
    """The model in a folder, made if it is not there, and a sample of its search space."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR if args.quick else real(args, TOKENIZER))
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
    return Given(folder, model, tokenizer, data, points, args.seed)


def timed_naive(
    given: Given, known: list[list[bool]], trials: int, examples: int
) -> tuple[float, int]:
    """Seconds for all trials and examples, from a sample of both, and verdicts that differ.

    Args:
        known: the search's verdicts on every example, per point.
    """
    data, few = given.data, copy.copy(given.data)
    few.limit = examples
    fixed = running = 0.0
    different = 0
    for point, verdicts in sample(list(zip(given.points, known, strict=True)), trials):
        started = time.perf_counter()
        model = GPTJForCausalLM.from_pretrained(given.folder).eval()
        naive_edit(model, point)
        middle = time.perf_counter()
        found = one_by_one(model, given.tokenizer, few)
        fixed, running = fixed + middle - started, running + time.perf_counter() - middle
        different += sum(a != b for a, b in zip(found, verdicts, strict=False))
    running *= len(data.examples) / len(few.examples)
    return (fixed + running) / trials * len(given.points), different


def timed_batched(
    given: Given, known: list[TrialResult], trials: int
) -> tuple[float, list[tuple[float, float]]]:
    """Seconds for all trials, from a sample, and how far accuracies and losses are from `known`."""
    differences = []
    started = time.perf_counter()
    for point, found in sample(list(zip(given.points, known, strict=True)), trials):
        fresh = GPTJForCausalLM.from_pretrained(given.folder).eval()
        compress(fresh, point.compressor, point.layers)
        plain = evaluate_model(fresh, given.tokenizer, given.data)
        differences.append((plain["accuracy"] - found.accuracy, plain["loss"] - found.loss))
    return (time.perf_counter() - started) / trials * len(given.points), differences


def sample(items: list[Any], count: int) -> list[Any]:
    """So many of them, evenly spread."""
    return [items[n * len(items) // count] for n in range(count)]


def verdicts_of(examiner: Examiner, found: TrialResult) -> list[bool]:
    """In the order of the dataset, not of the examination."""
    pairs = zip(examiner.parts[0].order, unpack(found.correct, found.seen), strict=True)
    return [verdict for _, verdict in sorted((e.index, verdict) for e, verdict in pairs)]


def in_turn(examiner: Examiner, points: list[Point]) -> list[TrialResult]:
    """Every point against the best one before it, given up when it has lost."""
    found: list[TrialResult] = []
    for point in points:
        best = best_of(found)
        rivals = [] if best is None else rivals_of(found[best], "verdicts")
        found.append(examiner(point, rivals, level=0.001))
    return found


def best_of(found: list[TrialResult]) -> int | None:
    """The place of the best one of those examined in full."""
    full = [i for i, f in enumerate(found) if not f.stopped]
    return min(full, key=lambda i: OBJECTIVES["accuracy"].order(found[i]), default=None)


def measure(given: Given, args: argparse.Namespace) -> tuple[dict[str, float], dict[str, Any]]:
    """Seconds of each way, and how far they agree."""
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    early = in_turn(given.examiner(), given.points)
    seconds["search"] = time.perf_counter() - started
    started = time.perf_counter()
    examine = given.examiner()
    full = [examine(point) for point in given.points]
    seconds["search in full"] = time.perf_counter() - started
    seconds["batched"], differences = timed_batched(given, full, args.batched_trials)
    known = [verdicts_of(examine, found) for found in full]
    few = args.naive_examples
    seconds["naive"], different = timed_naive(given, known, args.naive_trials, few)
    accuracies = [found.accuracy for found in full]
    return seconds, {
        "pruned": sum(found.stopped for found in early),
        "same_winner": best_of(early) == best_of(full),
        "accuracies": {"least": min(accuracies), "most": max(accuracies)},
        "largest_difference_accuracy_points": max(abs(a) for a, _ in differences),
        "largest_difference_loss": max(abs(b) for _, b in differences),
        "verdicts_that_differ_from_naive": different,
        "verdicts_compared": args.naive_trials * min(few, len(given.data.examples)),
        "trials": len(given.points),
        "questions": len(given.data.examples),
        "dataset": given.data.name,
    }


def main() -> None:
    args = arguments()
    begin(args)
    if args.beside is not None:
        part, found, about = beside(*args.beside)
        save("search", part, found, args, **about)
        return
    if args.model is not None:
        compared, about = answers(
            args.model, "wikidata_qa", real(args, WIKIDATA), mode=args.mode,
            layers=layers("--layers", args.layers), trials=args.trials, questions=args.questions,
            seed=args.seed,
        )  # fmt: skip
        save("search", f"{args.model.name}-{args.mode}", compared, args, **about)
        return
    with tempfile.TemporaryDirectory() as temporary:
        given = prepared(args.folder or Path(temporary), args)
        seconds, about = measure(given, args)
    compared = comparisons(seconds, args.quick)
    save("search", "cpu", compared, args, seconds=seconds, **about)


def comparisons(seconds: dict[str, float], quick: bool) -> dict[str, Comparison]:
    """All trials by the search, beside what the loops would take for them."""
    wanted = (None, None) if quick else WANTED
    out = {}
    for ours, how in (("search", ""), ("search in full", ", none pruned")):
        for peer, want in zip(("naive", "batched"), wanted, strict=True):
            out[f"all trials{how}, beside {peer}"] = Comparison(
                ours=seconds[ours], unit="s", peer=seconds[peer], peer_name=peer, wanted=want
            )
    return out


if __name__ == "__main__":
    main()
