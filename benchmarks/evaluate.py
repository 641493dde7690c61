"""Examples per second: this evaluator beside the papers' loop, in one run, with the same verdicts.

    python benchmarks/evaluate.py [--rows 400] [--naive-rows 80]

Reads real rows from the folder data of --shared (see docs/protocols.md) and two models:
tinystories-656K, a trained LLaMA, and a random GPT-J of 4 layers and width 128 whose tokenizer,
trained here on the same files, has every choice as one
token: there the papers' loop reads each FEVER and Bios prompt only once. The loop runs
with as many threads as suit it best, and is timed on a part of the rows, in
slices between those of the evaluator, so that both see the same machine; verdicts are compared on
that part. `--model FOLDER` measures a model on disk in their place, `--datasets` some of the four.
"""

import time
from pathlib import Path
from typing import Any

import torch
from support.naive import naive
from support.questions import FILES
from support.results import Comparison, begin, parser, real, save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTJConfig, PreTrainedTokenizerFast

from tensorllm.data.bios_profession import CHOICES
from tensorllm.evaluation.evaluate import make_dataset, score
from tensorllm.evaluation.scorer import context_of

WANTED = {"wikidata_qa": 12, "hotpotqa": 12, "fever": 4, "bios_profession": 4}
SLICES = 4


def trained_tokenizer(data: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 4,096 tokens; every choice is one of them."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    texts = ((data / file).read_text(encoding="utf-8") for file in FILES.values())
    lines = [line for text in texts for line in text.splitlines()]
    lines += [f" {word}" for word in (*CHOICES, "true", "false")] * 2000
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )


def gptj() -> Any:
    torch.manual_seed(0)
    config = GPTJConfig(
        vocab_size=4096, n_embd=128, n_layer=4, n_head=4, rotary_dim=16, n_positions=512,
        bos_token_id=0, eos_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def best_threads(model: Any, tokenizer: Any, data: Any, context: int) -> int:
    """All cores or one: with which the naive loop is faster."""
    cores = torch.get_num_threads()
    seconds = {}
    for threads in (1, cores, 1, cores):
        torch.set_num_threads(threads)
        started = time.perf_counter()
        for e in data.examples[:4]:
            naive(model, tokenizer, e, data.max_new_tokens, context=context)
        seconds[threads] = min(seconds.get(threads, 1e9), time.perf_counter() - started)
    torch.set_num_threads(cores)
    return min(seconds, key=seconds.__getitem__)


def race(model: Any, tokenizer: Any, data: Any, naive_rows: int) -> dict[str, Any]:
    """Both ways over the same examples, in alternating slices."""
    examples, new = data.examples, data.max_new_tokens
    context = context_of(model.config, tokenizer)
    score(model, tokenizer, examples[:16], max_new_tokens=new)  # warm up
    cores, threads = torch.get_num_threads(), best_threads(model, tokenizer, data, context)
    ours, theirs, verdicts, rows = 0.0, 0.0, [], []
    step = -(-naive_rows // SLICES)
    for part in range(SLICES):
        started = time.perf_counter()
        rows = score(model, tokenizer, examples, max_new_tokens=new)
        ours += time.perf_counter() - started
        torch.set_num_threads(threads)
        started = time.perf_counter()
        for e in examples[part * step : min((part + 1) * step, naive_rows)]:
            verdicts.append(naive(model, tokenizer, e, new, context=context))
        theirs += time.perf_counter() - started
        torch.set_num_threads(cores)
    pairs = list(zip(rows, verdicts, strict=False))
    speed, naive_speed = SLICES * len(examples) / ours, len(verdicts) / theirs
    return {
        "examples": len(examples),
        "examples_per_second": round(speed, 1),
        "naive_examples": len(verdicts),
        "naive_threads": threads,
        "naive_examples_per_second": round(naive_speed, 2),
        "times_faster": round(speed / naive_speed, 2),
        "same_verdicts": all(row.correct == v.correct for row, v in pairs),
        "largest_loss_difference": max(abs(row.loss - v.loss) for row, v in pairs),
    }


def loaded(folder: Path) -> tuple[Any, Any]:
    """A model, in float32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, default=400)
    options.add_argument("--naive-rows", type=int, default=80)
    options.add_argument("--model", type=Path, help="folder of a causal model")
    options.add_argument("--datasets", nargs="+", choices=FILES, default=list(FILES))
    args = options.parse_args()
    if args.quick:
        args.rows, args.naive_rows = 8, 4
    begin(args)
    rows = real(args, "data")
    if args.model is not None:
        runs = {args.model.name: loaded(args.model)}
    else:
        runs = {
            "tinystories-656K": loaded(real(args, "models/tinystories-656K")),
            "gptj-4x128-random": (gptj(), trained_tokenizer(rows)),
        }
    found: dict[str, dict[str, Any]] = {}
    titles = ("ours/s", "naive/s", "times", "wanted")
    print(f"{'model':<20}{'dataset':<18}" + "".join(f"{t:>9}" for t in titles) + "  verdicts")
    for name, (model, tokenizer) in runs.items():
        for dataset in args.datasets:
            path = rows / FILES[dataset]
            data = make_dataset(dataset, data_file=path, split="all", limit=args.rows)
            data.connect(tokenizer)
            result = race(model, tokenizer, data, min(args.naive_rows, args.rows))
            found.setdefault(name, {})[dataset] = {**result, "wanted": WANTED[dataset]}
            print(
                f"{name:<20}{dataset:<18}{result['examples_per_second']:>9.1f}"
                f"{result['naive_examples_per_second']:>9.2f}{result['times_faster']:>9.1f}"
                f"{WANTED[dataset]:>9}  {'same' if result['same_verdicts'] else 'DIFFERENT'}",
                flush=True,
            )
    compared = comparisons(found, targets=not args.quick)
    part = "cpu" if args.model is None else args.model.name
    save("evaluate", part, compared, args, dtype="float32", protocol="strict", results=found)


def comparisons(found: dict[str, dict[str, Any]], targets: bool) -> dict[str, Comparison]:
    """Every dataset on every model, beside the papers' loop."""
    return {
        f"{dataset}, {model}": Comparison(
            ours=one["examples_per_second"],
            unit="examples/s",
            peer=one["naive_examples_per_second"],
            peer_name="the papers' loop",
            more_is_better=True,
            wanted=one["wanted"] if targets else None,
        )
        for model, datasets in found.items()
        for dataset, one in datasets.items()
    }


if __name__ == "__main__":
    main()
