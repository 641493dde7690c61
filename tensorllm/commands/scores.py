"""Scoring a model before and after a compression."""

from functools import cache
from pathlib import Path
from typing import Any

from tensorllm.commands.compress import Evaluate
from tensorllm.progress import Progress, quiet


def scorer(
    data_file: Path | None = None, limit: int | None = None, progress: Progress = quiet
) -> Evaluate:
    """A function that scores a model on a dataset's test part, protocol `strict`.

    Args:
        data_file: the dataset's rows, instead of the hub.
        limit: at most so many examples.
        progress: called with (examples scored, examples in all, what is done).
    """
    from tensorllm.evaluation.evaluate import evaluate_model, make_dataset

    read = cache(lambda name: make_dataset(name, data_file=data_file, limit=limit))

    def score(model: Any, tokenizer: Any, dataset: str) -> dict[str, Any]:
        data, done = read(dataset), 0

        def count(rows: list[Any]) -> None:
            nonlocal done
            done += len(rows)
            progress(done, len(data.examples), f"scoring {dataset}")

        return evaluate_model(model, tokenizer, data, on_batch=count)

    return score
