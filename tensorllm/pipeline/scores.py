"""Scoring a model before and after a compression."""

from typing import Any

from tensorllm.pipeline.compress import Evaluate


def scorer(limit: int | None = None) -> Evaluate:
    """A function that scores a model on a dataset's test part: accuracy in per cent, loss."""

    def score(model: Any, tokenizer: Any, dataset: str) -> dict[str, Any]:
        from tensorllm.pipeline.evaluate import evaluate_model

        return evaluate_model(model, tokenizer, dataset, limit=limit)

    return score
