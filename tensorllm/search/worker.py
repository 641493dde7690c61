"""What a worker does with a trial: choose its values, examine them, record the result."""

import time
from collections.abc import Callable, Sequence
from itertools import takewhile

import optuna
from optuna.trial import TrialState

from tensorllm.errors import Incomplete, UserError
from tensorllm.options import Value
from tensorllm.requests.search import SearchRequest
from tensorllm.search.examiner import Examiner, Infeasible, too_large
from tensorllm.search.feasible import collides, ratio_of
from tensorllm.search.objectives import Objective
from tensorllm.search.queue import RESULT, TrialQueue
from tensorllm.search.samplers import Sampler
from tensorllm.search.selection import finished
from tensorllm.search.space import LAYER, Matrices, Point, Space
from tensorllm.search.stopping import Rival, rivals_of
from tensorllm.search.trial import TrialResult

Report = Callable[[TrialQueue], None]
FAILURES = (Incomplete, RuntimeError, ArithmeticError, UserError)  # of a trial, not of the search


def suggest(trial: optuna.Trial, space: Space, *, queued: bool) -> dict[str, Value]:
    """Values of all dimensions: queued ones, else chosen by the sampler.

    It chooses among the values the user listed, or within the bounds of the strategy's own.
    """
    return {
        name: _suggest(trial, name, values, queued or name in space.given, name in space.log)
        for name, values in space.choices.items()
    }


def _suggest(
    trial: optuna.Trial, name: str, values: Sequence[Value], only: bool, log: bool
) -> Value:
    low, high = values[0], values[-1]
    gaps = name == LAYER and len(values) != int(high) - int(low) + 1
    if only or gaps or isinstance(low, str):
        chosen = trial.suggest_categorical(name, list(values))
        assert chosen is not None
        return chosen
    if isinstance(low, int):
        return trial.suggest_int(name, low, int(high), log=log)
    return trial.suggest_float(name, float(low), float(high), log=log)


class Worker:
    """Takes trials from the queue and examines them.

    Args:
        queue: of the study.
        space: the search space.
        examiner: examines the points.
        request: says which points are left out or pruned.
        goal: the objective.
        original: the unedited model's result, if the objective counts changes from it.
        sampler: chooses the trials' values.
        excluded: matrices that are not edited again.
        deadline: `time.time()` after which no trial is begun; None: none.
    """

    def __init__(
        self,
        queue: TrialQueue,
        space: Space,
        examiner: Examiner,
        request: SearchRequest,
        *,
        goal: Objective,
        original: TrialResult | None,
        sampler: Sampler,
        excluded: Matrices = frozenset(),
        deadline: float | None = None,
    ) -> None:
        self.queue = queue
        self.space = space
        self.examiner = examiner
        self.request = request
        self.goal = goal
        self.original = original
        self.sampler = sampler
        self.excluded = excluded
        self.deadline = deadline

    def run(self, report: Report | None = None) -> None:
        """Work until the queue is empty or time is up; call `report` after each round of trials."""
        while not self.late and (trials := self._taken()):
            self.examine(trials)
            if report is not None:
                report(self.queue)

    def _taken(self) -> list[optuna.Trial]:
        """The next trials: as many as are best examined at once.

        But no more than this worker's share of what is left, and no more than the sampler would
        choose without knowing each other's results.
        """
        free = self.queue.waiting() + self.queue.left()
        share = -(-free // max(1, self.request.workers))
        most = min(self.examiner.side_by_side, share)
        if most > 1:
            ended = self.queue.trials(TrialState.COMPLETE, TrialState.PRUNED)
            most = min(most, self.sampler.independent(len(ended)))
        taken = (self.queue.take() for _ in range(max(1, most)))
        return [trial for trial in takewhile(lambda trial: trial is not None, taken) if trial]

    @property
    def late(self) -> bool:
        return self.deadline is not None and time.time() >= self.deadline

    def examine(self, trials: Sequence[optuna.Trial]) -> None:
        """Examine these trials at once, to their ends; an error in one becomes its result."""
        new: dict[str, tuple[Point, list[optuna.Trial]]] = {}
        for trial in trials:
            values = suggest(trial, self.space, queued=self.sampler.queued)
            if (reason := self._infeasible(values)) is not None:
                self.queue.finish(trial, TrialState.PRUNED, reason=reason)
                continue
            point = self.space.point(values)
            if (known := self._known(point)) is not None:
                self._finish(trial, known)
            else:
                new.setdefault(point.key, (point, []))[1].append(trial)
        if len(new) > 1:
            try:
                found = self._examined([point for point, _ in new.values()])
            except FAILURES:  # one of them failed, or all together exceed the memory
                pass
            else:
                for (_, own), result in zip(new.values(), found, strict=True):
                    self._end(own, result)
                return
        for point, own in new.values():
            self._examine_alone(own, point)

    def _examine_alone(self, trials: Sequence[optuna.Trial], point: Point) -> None:
        try:
            (result,) = self._examined([point])
        except Incomplete as error:
            self._fail(trials, str(error))
        except FAILURES as error:
            self._fail(trials, f"{type(error).__name__}: {error}".splitlines()[0][:300])
        else:
            self._end(trials, result)

    def _fail(self, trials: Sequence[optuna.Trial], reason: str) -> None:
        for trial in trials:
            self.queue.finish(trial, TrialState.FAIL, reason=reason)

    def _examined(self, points: Sequence[Point]) -> list[TrialResult | Infeasible]:
        none = self.request.level is None
        return self.examiner.together(
            points,
            [[] if none else self._rivals(point) for point in points],
            level=self.request.level or 0.0,
            max_error=self.request.max_error,
            min_ratio=self.request.least_ratio,
        )

    def _end(self, trials: Sequence[optuna.Trial], result: TrialResult | Infeasible) -> None:
        """Record the result of one point for all its trials."""
        for trial in trials:
            if isinstance(result, Infeasible):
                self.queue.finish(trial, TrialState.PRUNED, reason=str(result))
            else:
                self._finish(trial, result)

    def _infeasible(self, values: dict[str, Value]) -> str | None:
        if self.space.settings(values) is None:
            return "no weights have such settings: a rank is more than the product of the others"
        jobs = self.examiner.jobs(self.space.point(values))
        if collides(jobs, self.excluded):
            return "a matrix is edited already"
        ratio, least = ratio_of(jobs, self.examiner.roles), self.request.least_ratio
        return None if ratio is None or ratio >= least else too_large(ratio, least)

    def _finish(self, trial: optuna.Trial, result: TrialResult) -> None:
        goal, found = self.goal, result.to_json()
        values = list(goal.values(result))
        if result.stopped and not goal.several:  # Optuna cannot prune trials with several values
            self.queue.report(trial, values[0], result.seen)
            self.queue.finish(trial, TrialState.PRUNED, result=found)
        else:
            self.queue.finish(trial, TrialState.COMPLETE, values, result=found)

    def _known(self, point: Point) -> TrialResult | None:
        """The result of an earlier trial of the same point: samplers repeat themselves."""
        if self.sampler.queued:
            return None
        for other in self.queue.trials(TrialState.COMPLETE, TrialState.PRUNED):
            if RESULT in other.user_attrs and self.space.point(other.params).key == point.key:
                return TrialResult.from_json(other.user_attrs[RESULT])
        return None

    def _rivals(self, point: Point) -> list[Rival]:
        """What the best comparable trial so far demands of this point; empty: no pruning."""
        goal = self.goal
        if goal.prune_by is None:
            return []
        ratio = ratio_of(self.examiner.jobs(point), self.examiner.roles) or 1.0
        best = [r for _, r in finished(self.queue.trials()) if goal.comparable(r, ratio)]
        if not best:
            return []
        return rivals_of(min(best, key=goal.order), goal.prune_by, self.original)
