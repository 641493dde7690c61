"""Scoring a model before and after a compression."""

from functools import cache
from pathlib import Path
from typing import Any

from tensorllm.pipeline.compress import Evaluate


def scorer(data_file: Path | None = None, limit: int | None = None) -> Evaluate:
    """A function that scores a model on a dataset's test part, protocol `strict`.

    Args:
        data_file: the dataset's rows, instead of the hub.
        limit: at most so many examples.
    """
    from tensorllm.evaluation.evaluate import evaluate_model, make_dataset

    read = cache(lambda name: make_dataset(name, data_file=data_file, limit=limit))

    def score(model: Any, tokenizer: Any, dataset: str) -> dict[str, Any]:
        return evaluate_model(model, tokenizer, read(dataset))

    return score
