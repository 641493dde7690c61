"""The winner, and how much of its gain is the luck of having been selected.

Shapes: T trials, N validation examples, R resamples.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from tensorllm.search.objectives import Objective
from tensorllm.search.queue import RESULT
from tensorllm.search.trial import TrialResult, unpack

RESAMPLES = 1000


Finished = list[tuple[FrozenTrial, TrialResult]]


def finished(trials: Sequence[FrozenTrial]) -> Finished:
    """The trials that were examined in full, with their results."""
    full = [t for t in trials if t.state == TrialState.COMPLETE and RESULT in t.user_attrs]
    pairs = [(t, TrialResult(**t.user_attrs[RESULT])) for t in full]
    return [(t, result) for t, result in pairs if not result.stopped]


def ranked(trials: Sequence[FrozenTrial], goal: Objective) -> Finished:
    """The trials that were examined in full, the best first; ties by loss, size, then values."""
    return sorted(finished(trials), key=lambda pair: (*goal.order(pair[1]), _values(pair[0])))


def front(trials: Sequence[FrozenTrial], goal: Objective) -> Finished:
    """Trials that no other one beats in all values of the objective, the best of the first value
    first."""
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
    trials: Sequence[FrozenTrial], original: TrialResult, seed: int, resamples: int = RESAMPLES
) -> dict[str, Any] | None:
    """How far selection flatters the winner's accuracy, by the bootstrap over validation examples.

    Per resample the trial with the best accuracy on the drawn examples is chosen as in the search;
    its accuracy there minus that on the examples not drawn is the optimism. Pruned trials are
    left out: they lost on the way.

    Returns:
        `optimism` (points), its 95 % `interval`, `gain` over the original on validation (points),
        and `gain_without` the optimism; None where there is no accuracy or one trial only.
    """
    return optimism([found for _, found in finished(trials)], original, seed, resamples)


def optimism(
    results: Sequence[TrialResult], original: TrialResult, seed: int, resamples: int = RESAMPLES
) -> dict[str, Any] | None:
    """`selection_gain` of the results that a choice was made from."""
    known = [found for found in results if found.accuracy is not None]
    if len(known) < 2 or original.accuracy is None:
        return None
    correct_TN = np.array([unpack(f.correct, f.seen) for f in known], np.float32)
    n = correct_TN.shape[1]
    generator = np.random.default_rng(seed)
    gaps = []
    for _ in range(resamples):
        times_N = np.bincount(generator.integers(0, n, n), minlength=n)
        out_N = times_N == 0
        chosen = int(np.argmax(correct_TN @ times_N.astype(np.float32)))
        inside = float(correct_TN[chosen] @ times_N) / n
        outside = float(correct_TN[chosen][out_N].mean()) if out_N.any() else inside
        gaps.append(100 * (inside - outside))
    mean = float(np.mean(gaps))
    gain = max(f.accuracy or 0.0 for f in known) - original.accuracy
    low, high = np.quantile(gaps, [0.025, 0.975])
    return {
        "optimism": mean,
        "interval": [float(low), float(high)],
        "gain": gain,
        "gain_without": gain - mean,
        "resamples": resamples,
    }


def half_width(examples: int) -> float:
    """Half of the 95 % interval of an accuracy near one half, in points."""
    return 100 * 1.96 * 0.5 / max(1, examples) ** 0.5


def _values(trial: FrozenTrial) -> str:
    """An order of trials that does not depend on when they were run."""
    return repr(sorted(trial.params.items()))
