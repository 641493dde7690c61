"""How certain a figure is: bootstrap intervals, and paired tests of before against after.

Shapes: N examples, C columns, R resamples.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorllm.evaluation.predictions import Prediction

RESAMPLES = 2000
TAIL = (1 - 0.95) / 2  # probability outside an interval, on either side
NORMAL = 1.959964  # 97.5 % quantile of the standard normal distribution
LEAST_P = 2 / RESAMPLES  # least p of a bootstrap: these resamples cannot resolve a smaller one
CHUNK = 2**22  # numbers drawn at once
Numbers = NDArray[np.float64]


def resampled_means(values_NC: Numbers, seed: int, resamples: int = RESAMPLES) -> Numbers:
    """Means (R, C) of the columns over examples drawn with replacement; columns share the draws."""
    generator = np.random.default_rng(seed)
    n = len(values_NC)
    per_chunk = max(1, CHUNK // max(n, 1))
    means = []
    for start in range(0, resamples, per_chunk):
        drawn = generator.integers(0, n, (min(per_chunk, resamples - start), n))
        # one bincount for all resamples of the chunk, then means by a matrix product
        flat = (drawn + n * np.arange(len(drawn))[:, None]).ravel()
        counts_RN = np.bincount(flat, minlength=n * len(drawn)).reshape(len(drawn), n)
        means.append(counts_RN @ values_NC / n)
    return np.concatenate(means)


def interval(samples: Numbers) -> list[float]:
    """The 95 % percentile interval [low, high]."""
    return [float(v) for v in np.quantile(samples, [TAIL, 1 - TAIL])]


def intervals(predictions: Sequence[Prediction], seed: int) -> dict[str, list[float]]:
    """95 % bootstrap intervals of accuracy (per cent), loss (nats per token) and perplexity.

    If all verdicts are the same, every resample of them is too, and the bootstrap interval would
    have no width: the accuracy's is then Wilson's (1927).
    """
    columns = [
        [
            r.loss,
            -r.log_probability,
            r.answer_tokens,
            0.0 if r.correct is None else 100.0 * r.correct,
        ]
        for r in predictions
    ]
    means_RC = resampled_means(np.array(columns, np.float64), seed)
    found = {
        "loss": interval(means_RC[:, 0]),
        "perplexity": interval(np.exp(means_RC[:, 1] / means_RC[:, 2])),
    }
    if predictions[0].correct is not None:
        right, asked = sum(bool(r.correct) for r in predictions), len(predictions)
        same = right in (0, asked)
        found["accuracy"] = _wilson(right, asked) if same else interval(means_RC[:, 3])
    return found


def _wilson(right: int, asked: int) -> list[float]:
    """Wilson's 95 % interval of an accuracy, per cent."""
    from scipy.stats import binomtest  # takes half a second to import

    return [100 * float(bound) for bound in binomtest(right, asked).proportion_ci(method="wilson")]


def _unchanged(examples: int) -> list[float]:
    """95 % interval of a difference of accuracies, in points, where no verdict changed.

    Source: Agresti and Min, Statistics in Medicine 2005: Wald's interval with half an example added
    to each cell of the table of verdicts.
    """
    half = 100 * NORMAL / (examples + 2)
    return [-half, half]


def mcnemar(wrong_to_right: int, right_to_wrong: int) -> float:
    """Exact two-sided p-value that wrong-to-right and right-to-wrong are equally likely."""
    from scipy.stats import binomtest  # takes half a second to import

    changed = wrong_to_right + right_to_wrong
    return float(binomtest(wrong_to_right, changed).pvalue) if changed else 1.0


def compared(
    before: Sequence[Prediction], after: Sequence[Prediction], seed: int
) -> dict[str, Any]:
    """Compare two runs over the same examples, in the same order: differences after - before.

    Returns:
        `wrong_to_right` and `right_to_wrong`: how many verdicts changed; `mcnemar_p`: the exact
        test of these; `accuracy` (points) and `loss` (nats per token): difference and 95 % paired
        bootstrap interval (if no verdict changed, the accuracy's interval is Agresti and Min's, as
        the bootstrap's would have no width); `loss_p`: twice the smaller share of resamples on
        either side of zero, at least `LEAST_P`.
    """
    verdicts = [(b.correct, a.correct) for b, a in zip(before, after, strict=True)]
    wrong_to_right = sum(was is False and now is True for was, now in verdicts)
    right_to_wrong = sum(was is True and now is False for was, now in verdicts)
    differences = np.array(
        [
            [a.loss - b.loss, 100.0 * (bool(a.correct) - bool(b.correct))]
            for b, a in zip(before, after, strict=True)
        ]
    )
    means_RC = resampled_means(differences, seed)
    loss, accuracy = differences.mean(0).tolist()
    share = float(np.mean(means_RC[:, 0] <= 0)), float(np.mean(means_RC[:, 0] >= 0))
    changed = wrong_to_right + right_to_wrong
    bounds = interval(means_RC[:, 1]) if changed else _unchanged(len(before))
    return {
        "accuracy": {"difference": accuracy, "interval": bounds},
        "loss": {"difference": loss, "interval": interval(means_RC[:, 0])},
        "loss_p": min(1.0, max(2 * min(share), LEAST_P)),
        "wrong_to_right": wrong_to_right,
        "right_to_wrong": right_to_wrong,
        "mcnemar_p": mcnemar(wrong_to_right, right_to_wrong),
        "examples": len(before),
    }
