"""Predictions without a model."""

import numpy as np

from tensorllm.evaluation.predictions import Prediction


def rows(count: int, seed: int = 0) -> list[Prediction]:
    """`count` predictions whose figures are drawn."""
    rng = np.random.default_rng(seed)
    return [
        Prediction(
            index=i,
            prompt="p",
            answer="a",
            generation="g",
            correct=bool(rng.integers(2)),
            log_probability=-float(rng.exponential(5)),
            answer_tokens=int(rng.integers(1, 6)),
            rank=int(rng.integers(1, 20)),
            token_f1=float(rng.random()),
        )
        for i in range(count)
    ]
