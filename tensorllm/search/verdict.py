"""Whether the winner is better than the original, and what else could explain its gain.

Shapes: N test examples, L labels.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tensorllm.evaluation.predictions import Prediction
from tensorllm.evaluation.prior import without_prior
from tensorllm.search.objectives import Objective

Finding = Literal["better", "no better", "not known"]
LEVEL = 0.05  # of the paired test on the test part
MOST_LABELS = 20
SHARE = 0.5  # of a gain that a shifted label prior must explain to be named as its cause
STEPS = 500


def verdict(
    comparison: Mapping[str, Any],
    selection: Mapping[str, Any] | None,
    guards: Mapping[str, Any] | None,
    goal: Objective,
    level: float = LEVEL,
) -> dict[str, Any]:
    """Judge the winner against the original.

    Better: the test part improves, the paired test (McNemar's for accuracy, the bootstrap for
    loss) has p <= `level`, and the gain on validation exceeds what selection alone gives. No
    better: the test part does not improve. Otherwise it is not known.

    Args:
        comparison: `evaluation.statistics.compared` of original and winner on the test part.
        selection: `selection_gain`; None: not known.
        guards: `guards_of` original and winner; None: does not apply.
        goal: decides whether accuracy or loss is tested.
        level: of the paired test.

    Returns:
        `found`; `sentence`, which explains it; `shifted_prior`: whether the gain comes from a
        shift of the label prior; and `p`.
    """
    metric, change, p = _tested(comparison, goal)
    real = selection is None or metric == "loss" or selection["gain_without"] > 0
    found: Finding = "not known"
    if change <= 0:
        found = "no better"
    elif p <= level and real:
        found = "better"
    why = _why(comparison, metric, p)
    if found == "not known" and not real:
        why += "; on validation selection alone is worth its gain"
    shifted = guards is not None and change > 0 and bool(guards["shifted_prior"])
    if shifted:
        assert guards is not None
        why += (
            "; the gain comes from a shifted label prior: the original with the winner's shares of "
            f"labels has {guards['prior_alone']:.1f} %"
        )
    sentence = f"{found}: {why}"
    return {"found": found, "sentence": sentence, "shifted_prior": shifted, "p": p}


def overall(
    labels: Sequence[str],
    comparisons: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Mapping[str, Any]],
    goal: Objective,
) -> dict[str, Any]:
    """The verdict over several datasets; a single dataset's verdict is returned as it is.

    Better: better on at least one, with the level of the test shared among the datasets, and
    significantly worse (p <= `LEVEL`) on none. No better: significantly worse on one, or improved
    on none. Otherwise it is not known.
    """
    if len(verdicts) == 1:
        return dict(verdicts[0])
    changes = [_tested(comparison, goal)[1] for comparison in comparisons]
    by_label = list(zip(labels, verdicts, changes, strict=True))
    worse = [(label, v) for label, v, change in by_label if change < 0 and v["p"] <= LEVEL]
    better = [(label, v) for label, v, _ in by_label if v["found"] == "better"]
    found: Finding = "not known"
    if worse:
        found, why = "no better", f"significantly worse on {_names(worse)}"
        if better:
            why = f"better on {_names(better)}, but {why}"
    elif better:
        found, why = "better", f"better on {_names(better)}, significantly worse on none"
    elif max(changes) <= 0:
        found, why = "no better", "no dataset improves on its test part"
    else:
        why = "no dataset is certainly better, none significantly worse"
    named = worse or better or list(zip(labels, verdicts, strict=True))
    return {
        "found": found,
        "sentence": f"{found}: {why}",
        "shifted_prior": any(v["shifted_prior"] for _, v in better),
        "p": min(v["p"] for _, v in named),
    }


def _names(named: Sequence[tuple[str, Any]]) -> str:
    return " and ".join(label for label, _ in named)


def _tested(comparison: Mapping[str, Any], goal: Objective) -> tuple[str, float, float]:
    """The metric that is tested, its change (above 0: better), and p."""
    if goal.metric == "loss" or not comparison["asked"]:
        return "loss", -comparison["loss"]["difference"], comparison["loss_p"]
    return "accuracy", comparison["accuracy"]["difference"], comparison["mcnemar_p"]


def _why(comparison: Mapping[str, Any], metric: str, p: float) -> str:
    low, high = comparison[metric]["interval"]
    unit, digits = (" nats", 4) if metric == "loss" else (" points", 1)
    text = (
        f"on {comparison['examples']:,} test examples {metric} changes by "
        f"{comparison[metric]['difference']:+z.{digits}f}{unit} "
        f"(95 % interval {low:+z.{digits}f} to {high:+z.{digits}f}"
    )
    if metric == "accuracy":
        text += (
            f"; {comparison['wrong_to_right']} wrong→right, "
            f"{comparison['right_to_wrong']} right→wrong"
        )
    return text + ("; p < 0.0001)" if p < 1e-4 else f"; p = {p:.2g})")


def guards_of(before: Sequence[Prediction], after: Sequence[Prediction]) -> dict[str, Any] | None:
    """What accuracy alone hides, for questions that share a few labels.

    Returns:
        None if the answers are not a few labels, else:
        `majority`: the accuracy of always choosing the commonest label, per cent.
        `original`, `winner`: of each `balanced_accuracy` (mean recall over the labels, per cent)
        and the `shares` of predicted labels.
        `prior_alone`: accuracy of the original's choices when each label gets a bonus such that it
        predicts labels as often as the winner does; None if the questions' choices differ.
        `without_prior`: accuracy of both with each model's label prior removed.
        `shifted_prior`: whether `prior_alone` explains half of the gain or more, or balanced
        accuracy does not improve.
    """
    labels = sorted({row.answer for row in before})
    if not 2 <= len(labels) <= MOST_LABELS or any(
        not row.choice_log_probabilities for row in before
    ):
        return None
    scores = {"original": _by_label(before, labels), "winner": _by_label(after, labels)}
    accuracy = {n: _accuracy(r) for n, r in (("original", before), ("winner", after))}
    gain = accuracy["winner"] - accuracy["original"]
    prior = _prior_alone(before, after, labels)
    explained = prior is not None and gain > 0 and prior - accuracy["original"] >= SHARE * gain
    balanced = scores["winner"]["balanced_accuracy"] - scores["original"]["balanced_accuracy"]
    order = _label_order(before, labels)
    plain = None
    if order is not None and _label_order(after, labels) in (order, None):
        plain = {
            name: _accuracy(without_prior(rows, order))
            for name, rows in (("original", before), ("winner", after))
        }
    counts = [sum(row.answer == label for row in before) for label in labels]
    return {
        "majority": 100 * max(counts) / len(before),
        **scores,
        "prior_alone": prior,
        "without_prior": plain,
        "shifted_prior": gain > 0 and (explained or (prior is not None and balanced <= 0)),
    }


def _accuracy(rows: Sequence[Prediction]) -> float:
    return 100 * sum(bool(row.correct) for row in rows) / len(rows)


def _by_label(rows: Sequence[Prediction], labels: Sequence[str]) -> dict[str, Any]:
    recalls = [_accuracy([row for row in rows if row.answer == label]) for label in labels]
    chosen = [row.generation for row in rows]
    shares = {label: chosen.count(label) / len(chosen) for label in labels}
    return {"balanced_accuracy": sum(recalls) / len(recalls), "shares": shares}


def _prior_alone(
    before: Sequence[Prediction], after: Sequence[Prediction], labels: Sequence[str]
) -> float | None:
    """The original's accuracy with a bonus per label that gives the winner's label shares."""
    width = {len(row.choice_log_probabilities) for row in before}
    if width != {len(labels)}:
        return None
    order = _label_order(before, labels)
    if order is None:
        return None
    scores_NL = np.array([row.choice_log_probabilities for row in before], np.float64)
    target_L = np.array([sum(row.generation == label for row in after) for label in order], float)
    bonus_L = _matching_bonus(scores_NL, target_L / len(after))
    chosen_N = (scores_NL + bonus_L).argmax(1)
    gold_N = np.array([order.index(row.answer) for row in before])
    return float(100 * (chosen_N == gold_N).mean())


def _label_order(rows: Sequence[Prediction], labels: Sequence[str]) -> list[str] | None:
    """The label of each choice, if all questions have the same choices in the same order."""
    order: list[str | None] = [None] * len(labels)
    for row in rows:
        best = int(np.argmax(row.choice_log_probabilities))
        if order[best] not in (None, row.generation):
            return None
        order[best] = row.generation
    left = [label for label in labels if label not in order]
    if order.count(None) > 1 or len(left) != order.count(None):
        return None
    return [label if label is not None else left[0] for label in order]


def _matching_bonus(
    scores_NL: NDArray[np.float64], target_L: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The bonus per label with which labels are predicted in nearly the target's shares."""
    bonus_L = np.zeros(scores_NL.shape[1])
    step = float(scores_NL.std()) or 1.0
    best, nearest = bonus_L, np.inf
    for n in range(STEPS):
        chosen_N = (scores_NL + bonus_L).argmax(1)
        share_L = np.bincount(chosen_N, minlength=len(bonus_L)) / len(chosen_N)
        distance = float(np.abs(share_L - target_L).sum())
        if distance < nearest:
            best, nearest = bonus_L.copy(), distance
        bonus_L = bonus_L + step / (1 + n / 20) * (target_L - share_L)
    return best
