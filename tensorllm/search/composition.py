"""Several edits stacked greedily: add the best next edit for as long as validation improves.

Source: LASER, section 5 (composing reductions across layers).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from tensorllm.errors import Incomplete
from tensorllm.requests.search import SearchRequest
from tensorllm.search.guide import agreement
from tensorllm.search.objectives import Objective
from tensorllm.search.queue import REASON, TrialQueue
from tensorllm.search.selection import by_dataset, ranked, selection_gain
from tensorllm.search.space import Point
from tensorllm.search.study import Study
from tensorllm.search.trial import TrialResult


@dataclass(frozen=True, slots=True)
class Step:
    """One search of a stack: its trials, the best one, and the model it started from.

    Attributes:
        point: the best trial's point.
        result: the best trial's result.
        original: the result on validation without this step's edit.
        trials: all trials of this step.
        number: the best trial's number.
        guide: how well the guide's predictions rank the trials; None: the search was not guided.
    """

    point: Point
    result: TrialResult
    original: TrialResult
    trials: list[FrozenTrial]
    number: int
    guide: dict[str, Any] | None = None

    def gains(self, goal: Objective) -> bool:
        """Whether the edit improves the objective on validation."""
        return bool(goal.order(self.result)[0] < goal.order(self.original)[0])


def best_of(run: Study, queue: TrialQueue) -> Step:
    """The best trial of a finished search, as a step.

    Raises:
        Incomplete: no trial was examined in full.
    """
    trials = queue.trials()
    order = ranked(trials, run.goal_of(queue))
    if not order:
        if run.late:
            raise Incomplete(
                f"--time-limit ended before the first of {len(trials)} trials was examined in full;"
                " give it more time (with --study the same command goes on)"
            )
        raise Incomplete(f"no trial could be examined in full: {_reasons(trials)}")
    winner, result = order[0]
    point = run.space.point(winner.params)
    original = run.original(queue)
    guide = None
    if run.guide is not None:
        guide = agreement(
            run.guide, trials, lambda trial: run.space.point(trial.params).key, original
        )
    return Step(point, result, original, trials, winner.number, guide)


def on_top(request: SearchRequest, folder: Path, steps: Sequence[Step]) -> SearchRequest:
    """The request that searches for the next edit, on top of those already chosen.

    Its study lies in the first one's folder and is named after the edits below it, since more
    trials of an earlier step may change them.
    """
    base = tuple(step.point.recipe() for step in steps)
    digest = hashlib.sha256(repr([step.point.key for step in steps]).encode()).hexdigest()[:8]
    name = f"{folder.name}-step-{len(steps) + 1}-{digest}"
    return replace(request, base=base, study=folder / name)


def composed(steps: Sequence[Step]) -> Point:
    """All edits as one point."""
    if len(steps) == 1:
        return steps[0].point
    layers = sorted({layer for step in steps for layer in step.point.layers})
    return Point("per-layer", tuple(layers), {"edits": [step.point.recipe() for step in steps]})


def whole(steps: Sequence[Step], ratio: float) -> TrialResult:
    """The result of all edits together: the last step's scores and the steps' sizes added up."""
    saved = sum(step.result.parameters_saved for step in steps)
    error = max(step.result.relative_error for step in steps)
    seconds = sum(step.result.seconds for step in steps)

    def sized(found: TrialResult) -> TrialResult:
        return replace(
            found,
            ratio=ratio,
            parameters_saved=saved,
            relative_error=error,
            seconds=seconds,
            parts=tuple(part and sized(part) for part in found.parts),
        )

    return sized(steps[-1].result)


def selection(steps: Sequence[Step], seed: int) -> dict[str, Any] | None:
    """How much of the gain is selection bias; the optimism of several steps is added up."""
    of_steps = [selection_gain(step.trials, step.original, seed) for step in steps]
    known = [each for each in of_steps if each is not None]
    if not known or len(steps) == 1:
        return of_steps[0]
    before, after = by_dataset(steps[0].original), by_dataset(steps[-1].result)
    gains = [(a.accuracy or 0.0) - (b.accuracy or 0.0) for a, b in zip(after, before, strict=True)]
    total = _added(known, min(gains))
    if "datasets" not in known[0]:
        return total
    each = zip(gains, zip(*(one["datasets"] for one in known), strict=True), strict=True)
    return {**total, "datasets": [_added(of_dataset, gain) for gain, of_dataset in each]}


def _added(of_steps: Sequence[dict[str, Any]], gain: float) -> dict[str, Any]:
    optimism = sum(each["optimism"] for each in of_steps)
    return {
        "optimism": optimism,
        "interval": [sum(each["interval"][end] for each in of_steps) for end in (0, 1)],
        "gain": gain,
        "gain_without": gain - optimism,
        "resamples": of_steps[0]["resamples"],
    }


def _reasons(trials: Sequence[FrozenTrial]) -> str:
    reasons = [t.user_attrs[REASON] for t in trials if REASON in t.user_attrs]
    if not reasons:
        return "there is none"
    first = max(set(reasons), key=reasons.count)
    return f"{len(reasons)} trials, {reasons.count(first)} of them: {first}"
