"""Evaluate a model in memory on a dataset, without a Trainer."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tensorllm.data.base import DATASETS, ReasoningDataModule, Split
from tensorllm.data.catalog import Questions  # noqa: F401  registers all datasets
from tensorllm.data.example import Example
from tensorllm.data.questions import questions_from_yaml
from tensorllm.dataset_names import YAML
from tensorllm.evaluation.predictions import Prediction
from tensorllm.evaluation.protocol import PROTOCOLS, STRICT, Protocol
from tensorllm.evaluation.scorer import context_of, is_masked, make_scorer, score_all, workers_for
from tensorllm.evaluation.totals import metrics_of
from tensorllm.models.evaluating import evaluating
from tensorllm.progress import Progress, quiet


def make_dataset(
    dataset: str,
    *,
    data_file: Path | str | None = None,
    split: Split = "test",
    limit: int | None = None,
    **options: Any,
) -> ReasoningDataModule:
    """A dataset by its name, or by a YAML file that describes your own."""
    chosen = {"data_file": data_file, "split": split, "limit": limit, **options}
    if dataset.endswith(YAML):
        return questions_from_yaml(Path(dataset), **chosen)
    return DATASETS[dataset](**chosen)


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    protocol: Protocol = STRICT,
    *,
    max_new_tokens: int = 0,
    batch_tokens: int | None = None,
    on_batch: Callable[[list[Prediction]], None] | None = None,
) -> list[Prediction]:
    """Score all examples; predictions come in the order of the examples.

    Args:
        max_new_tokens: the most tokens of a generated answer.
        batch_tokens: tokens per batch; None: what suits the device.
        on_batch: called with the predictions of each finished batch.
    """
    scorer = make_scorer(
        model,
        tokenizer,
        protocol=protocol,
        max_new_tokens=max_new_tokens,
        batch_tokens=batch_tokens,
    )
    found: dict[int, Prediction] = {}
    for batch in score_all(scorer, scorer.plan(examples), workers_for(model)):
        found.update((p.index, p) for p in batch)
        if on_batch is not None:
            on_batch(batch)
    return [found[example.index] for example in examples]


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: str | ReasoningDataModule,
    protocol: str | Protocol = "strict",
    split: Split = "test",
    limit: int | None = None,
    *,
    data_file: Path | str | None = None,
    on_batch: Callable[[list[Prediction]], None] | None = None,
) -> dict[str, Any]:
    """Evaluate a model on a dataset.

    Args:
        model: any causal or masked transformers model, on its device.
        tokenizer: its tokenizer.
        dataset: a name, or a dataset (whose own split and limit then apply): it keeps its examples,
            so that a second call does not read them again.
        protocol: a name or a protocol.
        split: the first fifth (`val`), the rest (`test`) or `all`.
        limit: the most examples to use.
        data_file: a local file to read instead of the hub.
        on_batch: called with the predictions of each finished batch.

    Returns:
        `accuracy` (per cent), `loss` (nats per answer token) and the other metrics; `examples`
        (their number), `dataset`, `split` and `protocol`.
    """
    if isinstance(dataset, str):
        dataset = make_dataset(dataset, data_file=data_file, split=split, limit=limit)
    rules = PROTOCOLS[protocol] if isinstance(protocol, str) else protocol
    context = context_of(model.config, tokenizer)
    dataset.connect(tokenizer, masked=is_masked(model), context=context)
    with evaluating(model):
        predictions = score(
            model,
            tokenizer,
            dataset.examples,
            rules,
            max_new_tokens=dataset.max_new_tokens,
            on_batch=on_batch,
        )
    return {
        **metrics_of(predictions),
        "examples": len(predictions),
        "dataset": dataset.name,
        "split": dataset.split,
        "protocol": rules.name,
    }


def dataset_scorer(
    data_file: Path | None = None, limit: int | None = None, progress: Progress = quiet
) -> Callable[[PreTrainedModel, PreTrainedTokenizerBase, str], dict[str, Any]]:
    """A function that scores a model on a dataset's test part, protocol `strict`.

    It reads each dataset only once.

    Args:
        data_file: the dataset's rows, instead of the hub.
        limit: the most examples to use.
        progress: called with (examples scored, examples in all, what is done).
    """
    read = cache(lambda name: make_dataset(name, data_file=data_file, limit=limit))

    def score_on(
        model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dataset: str
    ) -> dict[str, Any]:
        data, done = read(dataset), 0

        def count(predictions: list[Prediction]) -> None:
            nonlocal done
            done += len(predictions)
            progress(done, len(data.examples), f"scoring {dataset}")

        return evaluate_model(model, tokenizer, data, on_batch=count)

    return score_on
