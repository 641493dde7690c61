"""Choose the winner, and estimate the optimism of its gain: the best of many is partly lucky.

Shapes: T trials, N validation examples, R resamples, C datasets.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState

from tensorllm.search.objectives import Objective
from tensorllm.search.queue import RESULT
from tensorllm.search.trial import TrialResult, unpack

RESAMPLES = 1000


Finished = list[tuple[FrozenTrial, TrialResult]]


def finished(trials: Sequence[FrozenTrial]) -> Finished:
    """The trials that were examined in full, with their results."""
    full = [t for t in trials if t.state == TrialState.COMPLETE and RESULT in t.user_attrs]
    pairs = [(t, TrialResult.from_json(t.user_attrs[RESULT])) for t in full]
    return [(t, result) for t, result in pairs if not result.stopped]


def ranked(trials: Sequence[FrozenTrial], goal: Objective) -> Finished:
    """The trials that were examined in full, best first; ties by loss, size, then values."""
    return sorted(finished(trials), key=lambda pair: (*goal.order(pair[1]), _values(pair[0])))


def front(trials: Sequence[FrozenTrial], goal: Objective) -> Finished:
    """The Pareto front: trials that no other one beats in all values; sorted by the first value."""
    best: list[tuple[float, ...]] = []
    out: Finished = []
    signs = [1 if direction == "maximize" else -1 for direction in goal.directions]
    for trial, result in ranked(trials, goal):
        values = tuple(s * v for s, v in zip(signs, goal.values(result), strict=True))
        if not any(all(b >= v for b, v in zip(other, values, strict=True)) for other in best):
            best.append(values)
            out.append((trial, result))
    return out


def selection_gain(
    trials: Sequence[FrozenTrial], original: TrialResult, seed: int
) -> dict[str, Any] | None:
    """Estimate how much selection inflates the winner's accuracy, by the bootstrap.

    In each resample of the validation examples the trial with the best accuracy is chosen, as in
    the search; its accuracy there minus that on the examples not drawn is the optimism. Pruned
    trials are left out: they lost on the way.

    Returns:
        `optimism` (points), its 95 % `interval`, `gain` over the original on validation (points),
        and `gain_without` the optimism; None if there is no accuracy or only one trial.
    """
    return optimism([found for _, found in finished(trials)], original, seed)


def optimism(
    results: Sequence[TrialResult], original: TrialResult, seed: int
) -> dict[str, Any] | None:
    """`selection_gain`, given the results that the winner was chosen from.

    Over several datasets the worst gain decides, each dataset's examples are resampled separately,
    and `datasets` has the same figures on each dataset for the trial that was chosen.
    """
    known = [found for found in results if found.accuracy is not None]
    before = by_dataset(original)
    if len(known) < 2 or any(part.accuracy is None for part in before):
        return None
    after = [[by_dataset(found)[at] for found in known] for at in range(len(before))]
    correct = [_verdicts(of_dataset) for of_dataset in after]  # (T, N) each
    changes = [c_TN - _verdicts([o]) for c_TN, o in zip(correct, before, strict=True)]
    generator = np.random.default_rng(seed)
    worst_R, gaps_RC = [], []
    for _ in range(RESAMPLES):
        times = [_drawn(c_TN.shape[1], generator) for c_TN in correct]
        sums = [c @ t.astype(np.float32) / len(t) for c, t in zip(changes, times, strict=True)]
        chosen = int(np.argmax(np.min(sums, 0)))
        pairs = [_means(c[chosen], t) for c, t in zip(correct, times, strict=True)]
        gaps_RC.append([100 * (inside - outside) for inside, outside in pairs])
        pairs = [_means(c[chosen], t) for c, t in zip(changes, times, strict=True)]
        inside, outside = np.min(pairs, 0)
        worst_R.append(100 * float(inside - outside))
    gains_CT = np.array(
        [[(f.accuracy or 0.0) - (o.accuracy or 0.0) for f in of_dataset]
         for of_dataset, o in zip(after, before, strict=True)]
    )  # fmt: skip
    gain_C = gains_CT[:, int(np.argmax(gains_CT.min(0)))]
    each = [
        _summary(gaps_R, float(gain))
        for gaps_R, gain in zip(np.array(gaps_RC).T, gain_C, strict=True)
    ]
    if not original.parts:
        return each[0]
    return {**_summary(np.array(worst_R), float(gain_C.min())), "datasets": each}


def by_dataset(result: TrialResult) -> list[TrialResult]:
    """The results on each dataset of a trial that was examined in full."""
    return [part for part in result.parts if part is not None] or [result]


def _verdicts(results: Sequence[TrialResult]) -> NDArray[np.float32]:
    return np.array([unpack(found.correct, found.seen) for found in results], np.float32)


def _drawn(n: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """How often each of n examples is drawn, with replacement."""
    return np.bincount(generator.integers(0, n, n), minlength=n)


def _means(values_N: NDArray[np.float32], times_N: NDArray[np.int64]) -> tuple[float, float]:
    """The mean over the examples that were drawn, and over those that were not."""
    inside = float(values_N @ times_N.astype(np.float32)) / len(times_N)
    out_N = times_N == 0
    return inside, float(values_N[out_N].mean()) if out_N.any() else inside


def _summary(gaps: NDArray[np.float64], gain: float) -> dict[str, Any]:
    mean, (low, high) = float(np.mean(gaps)), np.quantile(gaps, [0.025, 0.975])
    return {
        "optimism": mean,
        "interval": [float(low), float(high)],
        "gain": gain,
        "gain_without": gain - mean,
        "resamples": RESAMPLES,
    }


def half_width(examples: int) -> float:
    """Half the width of the 95 % interval of an accuracy near one half, in points."""
    return 100 * 1.96 * 0.5 / max(1, examples) ** 0.5


def _values(trial: FrozenTrial) -> str:
    """A sort key of trials that does not depend on when they were run."""
    return repr(sorted(trial.params.items()))
