"""What a search optimises.

A plugin adds an objective with `OBJECTIVES.register`, or by an entry point of the group
`tensorllm.objectives`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from tensorllm.registry import Registry
from tensorllm.search.trial import TrialResult

Direction = Literal["minimize", "maximize"]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """An objective, and how it is shown.

    Attributes:
        directions: `minimize` or `maximize`, for each value.
        values: maps a trial's result to one value per direction. The first one ranks the trials; if
            there are several, the Pareto front is listed too.
        show: the first value as text for progress and messages.
        prune_by: what a trial may be pruned by before its last example: `verdicts` (it is certain
            or very likely to have fewer right answers than the best), `loss` (certain to have a
            higher one), or None: every trial is examined in full.
        comparable: whether a trial may be pruned because of another one, given the other's result
            and the trial's own ratio.
    """

    directions: tuple[Direction, ...]
    values: Callable[[TrialResult], tuple[float, ...]]
    show: Callable[[TrialResult], str]
    prune_by: Literal["verdicts", "loss"] | None = None
    comparable: Callable[[TrialResult, float], bool] = lambda other, ratio: True

    @property
    def several(self) -> bool:
        """Whether several values are traded against each other, so that no single trial is best."""
        return len(self.directions) > 1

    @property
    def metric(self) -> Literal["accuracy", "loss"]:
        """The metric that is tested, and shown of a trial where there is room for only one."""
        return "loss" if self.prune_by == "loss" else "accuracy"

    def order(self, result: TrialResult) -> tuple[Any, ...]:
        """Sort key, smaller is better: the first value, then loss, then parameters saved."""
        value, direction = self.values(result)[0], self.directions[0]
        return (-value if direction == "maximize" else value, result.loss, -result.parameters_saved)


def over_datasets(goal: Objective, original: TrialResult) -> Objective:
    """The objective over several datasets: for each value, an edit's worst change on any of them.

    Changes count from the original on the same dataset.

    Args:
        original: the unedited model's result; if it is of one dataset, `goal` is returned as it is.
    """
    if not original.parts:
        return goal
    before = [None if part is None else goal.values(part) for part in original.parts]
    worst = [min if direction == "maximize" else max for direction in goal.directions]

    def values(result: TrialResult) -> tuple[float, ...]:
        changes = [
            [new - old for new, old in zip(goal.values(part), first, strict=True)]
            for part, first in zip(result.parts, before, strict=True)
            if part is not None and first is not None
        ]
        return tuple(pick(own) for pick, *own in zip(worst, *changes, strict=True))

    return replace(goal, values=values, show=lambda r: f"worst change {values(r)[0]:+.4g}")


OBJECTIVES: Registry[Objective] = Registry("objective", group="tensorllm.objectives")


def _accuracy(result: TrialResult) -> str:
    return f"{result.loss:.4f}" if result.accuracy is None else f"{result.accuracy:.2f} %"


OBJECTIVES.register("accuracy")(
    Objective(
        directions=("maximize",),
        values=lambda r: (r.accuracy or 0.0,),
        show=_accuracy,
        prune_by="verdicts",
    )
)
OBJECTIVES.register("loss")(
    Objective(
        directions=("minimize",),
        values=lambda r: (r.loss,),
        show=lambda r: f"{r.loss:.4f}",
        prune_by="loss",
    )
)
OBJECTIVES.register("pareto")(  # accuracy against size
    Objective(
        directions=("maximize", "maximize"),
        values=lambda r: (r.accuracy or 0.0, r.ratio),
        show=_accuracy,
        prune_by="verdicts",
        comparable=lambda other, ratio: other.ratio >= ratio,
    )
)
