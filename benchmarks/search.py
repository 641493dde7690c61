"""`python benchmarks/search.py`: the rank search against the loops it replaces, in one run.

A GPT-J model (width 512, 12 layers, random weights, its readout fitted to the questions so that
edits cost accuracy), 48 trials of shared Tucker ranks over its last
four layers, real questions from --data-file (FEVER's rows) or, without one, the demo world's
questions as text. Three ways, side by side:

- naive: reload the model, decompose with tensorly, one example at a time (on a sample of trials and
  of examples, scaled to all of them);
- batched: reload, tensorllm's decomposition and batched evaluation, nothing reused (on a sample of
  trials, scaled);
- search: as `search-ranks` does it, early stopping off, and once more with it on.
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
from results import Comparison, begin, parser, save
from tensorly.decomposition import partial_tucker
from transformers import AutoTokenizer, GPTJConfig, GPTJForCausalLM

from tensorllm.architectures import RoleMatrices, parameters_of
from tensorllm.compression.model import compress
from tensorllm.data.base import ReasoningDataModule
from tensorllm.data.demo import MODEL_DIR
from tensorllm.evaluation.evaluate import evaluate_model, make_dataset
from tensorllm.evaluation.protocol import PROTOCOLS
from tensorllm.evaluation.scorer import make_scorer
from tensorllm.search.examiner import Examiner, Found, unpack
from tensorllm.search.kept import Budget
from tensorllm.search.prefix import default_budget
from tensorllm.search.space import Point, make_space
from tensorllm.search.stopping import Rival
from tensorllm.tensors.stacking import ATTENTION, STACKINGS

TRIALS, LAYERS = 48, (8, 9, 10, 11)
MARGIN = 2.0  # nats between the right and the best wrong choice
WANTED = (30.0, 5.0)  # times faster than the naive and the batched loop


def arguments() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--data-file", type=Path, help="FEVER rows (jsonl)")
    options.add_argument("--tokenizer", type=Path, default=MODEL_DIR)
    options.add_argument("--questions", type=int, default=400)
    options.add_argument("--trials", type=int, default=TRIALS)
    options.add_argument("--naive-trials", type=int, default=1)
    options.add_argument("--naive-examples", type=int, default=50)
    options.add_argument("--batched-trials", type=int, default=3)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--folder", type=Path, help="of the model; a temporary one otherwise")
    args = options.parse_args()
    if args.quick:
        args.trials, args.questions, args.naive_examples, args.batched_trials = 4, 24, 4, 1
    return args


def make_model(
    folder: Path, tokenizer: Any, data: ReasoningDataModule | None, seed: int, width: int
) -> None:
    """Write the model as a checkpoint, so that reloading it costs what it costs.

    Args:
        data: questions that its readout is fitted to; None: to none.
    """
    torch.manual_seed(seed)
    config = GPTJConfig(
        vocab_size=len(tokenizer), n_embd=width, n_layer=12, n_head=16, n_positions=512,
        rotary_dim=16, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = GPTJForCausalLM(config).eval()
    if data is not None:
        fit_readout(model, tokenizer, data)
    model.save_pretrained(folder)


@torch.inference_mode()
def fit_readout(model: GPTJForCausalLM, tokenizer: Any, data: ReasoningDataModule) -> None:
    """Make the first choice's first token tell right from wrong answers, by least squares.

    A random model answers every question alike, whatever is edited: nothing would be to be found.
    """
    scorer = make_scorer(model, tokenizer)
    rows = [row for batch in scorer.plan(data.examples) for row in scorer.score(batch)]
    rows.sort(key=lambda row: row.index)
    prompt, choices = data.examples[0].prompt, data.examples[0].choices
    first = choices[0]
    gaps, wanted, states = [], [], []
    for example, row in zip(data.examples, rows, strict=True):
        if example.choices != choices or row.choice_log_probabilities is None:
            continue
        one, *others = row.choice_log_probabilities
        gaps.append(one - max(others))
        wanted.append(MARGIN if example.answer == first else -MARGIN)
        ids = torch.tensor([tokenizer(example.prompt)["input_ids"]])
        states.append(model.transformer(ids).last_hidden_state[0, -1])
    h_ND, target_N = torch.stack(states).double(), torch.tensor(wanted) - torch.tensor(gaps)
    token = tokenizer(f"{prompt} {first}")["input_ids"][len(tokenizer(prompt)["input_ids"])]
    found_D1 = torch.linalg.lstsq(h_ND, target_N.double()[:, None], driver="gelsd").solution
    model.lm_head.weight[token] += found_D1[:, 0].float()


def dataset(args: argparse.Namespace, tokenizer: object) -> ReasoningDataModule:
    """The questions: the first ones of a real file, or the demo world's."""
    name, file = ("fever", args.data_file) if args.data_file else ("demo", None)
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
        for role, w_ID in zip(ATTENTION, stacking.unstack(near, roles.geometry, 4), strict=True):
            roles.write(weights, layer, role, w_ID)


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


def timed_naive(args, folder, tokenizer, data, points) -> float:  # type: ignore[no-untyped-def]
    """Seconds for all trials and examples, from a sample of both."""
    few = copy.copy(data)
    few._examples = data.examples[: args.naive_examples]
    fixed = running = 0.0
    for point in points[: args.naive_trials]:
        started = time.perf_counter()
        model = GPTJForCausalLM.from_pretrained(folder).eval()
        naive_edit(model, point)
        middle = time.perf_counter()
        one_by_one(model, tokenizer, few)
        fixed, running = fixed + middle - started, running + time.perf_counter() - middle
    running *= len(data.examples) / len(few.examples)
    return (fixed + running) / args.naive_trials * len(points)


def stopping_early(examiner: Examiner, points: list[Point]) -> int:
    """How many of the points are given up, each against the best one before it."""
    best: Found | None = None
    stopped = 0
    for point in points:
        rival = Rival(unpack(best.correct, best.seen), best.loss) if best else None
        got = examiner(point, rival, level=0.001)
        stopped += got.stopped
        if not got.stopped and (best is None or got.accuracy >= best.accuracy):  # type: ignore[operator]
            best = got
    return stopped


def main() -> None:
    """Measure, print and save."""
    args = arguments()
    begin(args)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        data = dataset(args, tokenizer)
        if not (folder / "config.json").exists():
            fitted = data if args.data_file else None
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

        found: dict[str, float] = {}
        started = time.perf_counter()
        examine = examiner()
        full = [examine(point) for point in points]
        found["search"] = time.perf_counter() - started
        started = time.perf_counter()
        stopped = stopping_early(examiner(), points)
        found["search_early_stopping"] = time.perf_counter() - started

        started = time.perf_counter()
        differences = []
        for n in range(args.batched_trials):
            at = n * len(points) // args.batched_trials
            fresh = GPTJForCausalLM.from_pretrained(folder).eval()
            compress(fresh, points[at].compressor, points[at].layers)
            plain = evaluate_model(fresh, tokenizer, data)
            differences.append(
                [plain["accuracy"] - full[at].accuracy, plain["loss"] - full[at].loss]
            )
        found["batched"] = (time.perf_counter() - started) / args.batched_trials * len(points)
        found["naive"] = timed_naive(args, folder, tokenizer, data, points)

    about = {
        "seconds": found,
        "given_up": stopped,
        "largest_difference_accuracy_points": max(abs(a) for a, _ in differences),
        "largest_difference_loss": max(abs(b) for _, b in differences),
        "trials": len(points),
        "questions": len(data.examples),
        "dataset": data.name,
    }
    save("search", "cpu", comparisons(found, args.quick), args, **about)


def comparisons(found: dict[str, float], quick: bool) -> dict[str, Comparison]:
    """All trials by the search, beside what the loops would take for them."""
    wanted = (None, None) if quick else WANTED
    out = {
        f"all trials, beside {peer}": Comparison(
            ours=found["search"], unit="s", peer=found[peer], peer_name=peer, wanted=want
        )
        for peer, want in zip(("naive", "batched"), wanted, strict=True)
    }
    out["the same with early stopping"] = Comparison(
        ours=found["search_early_stopping"], unit="s", peer=found["search"], peer_name="without"
    )
    return out


if __name__ == "__main__":
    main()
