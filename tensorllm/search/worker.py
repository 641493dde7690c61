"""What a worker does with a trial: choose values, examine them, record what came out."""

import time
from collections.abc import Callable, Sequence

import optuna
from optuna.trial import TrialState

from tensorllm.errors import Incomplete, UserError
from tensorllm.options import Value
from tensorllm.registry import one_of
from tensorllm.requests.search import SAMPLERS, SearchRequest
from tensorllm.search.examiner import Examiner, Infeasible, too_large
from tensorllm.search.objectives import Objective
from tensorllm.search.queue import RESULT, TrialQueue
from tensorllm.search.selection import finished
from tensorllm.search.space import LAYER, Matrices, Point, Space, collides, ratio_of
from tensorllm.search.stopping import Rival, rivals_of
from tensorllm.search.storage import stable
from tensorllm.search.trial import TrialResult

Report = Callable[[TrialQueue], None]


def make_sampler(name: str, seed: int, workers: int = 1) -> optuna.samplers.BaseSampler:
    """The sampler of trials whose values are not queued."""
    one_of("--sampler", name, SAMPLERS)
    if name == "tpe":
        with stable():
            return optuna.samplers.TPESampler(seed=seed, constant_liar=workers > 1)
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)  # never asked: a grid is queued


def suggest(trial: optuna.Trial, space: Space, *, grid: bool) -> dict[str, Value]:
    """Values of all dimensions: the queued ones, those that the user named, or the sampler's
    within the bounds of the strategy's own."""
    return {
        name: _suggest(trial, name, values, grid or name in space.given, name in space.log)
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
        request: says what is left out or pruned.
        goal: what is best.
        original: the unedited model's result, where the goal counts changes from it.
        grid: whether all values are queued.
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
        grid: bool,
        excluded: Matrices = frozenset(),
        deadline: float | None = None,
    ) -> None:
        self.queue = queue
        self.space = space
        self.examiner = examiner
        self.request = request
        self.goal = goal
        self.original = original
        self.grid = grid
        self.excluded = excluded
        self.deadline = deadline

    def run(self, report: Report | None = None) -> None:
        """Work until the queue is empty or time is up; `report` is called after each trial."""
        while not self.late and (trial := self.queue.take()) is not None:
            self.examine(trial)
            if report is not None:
                report(self.queue)

    @property
    def late(self) -> bool:
        return self.deadline is not None and time.time() >= self.deadline

    def examine(self, trial: optuna.Trial) -> None:
        """One trial, to its end: whatever goes wrong with it is its result."""
        values = suggest(trial, self.space, grid=self.grid)
        if (reason := self._infeasible(values)) is not None:
            self.queue.finish(trial, TrialState.PRUNED, reason=reason)
            return
        point = self.space.point(values)
        try:
            result = self._known(point) or self.examiner(
                point,
                [] if self.request.level is None else self._rivals(point),
                level=self.request.level or 0.0,
                max_error=self.request.max_error,
                min_ratio=self.request.least_ratio,
            )
        except Infeasible as error:
            self.queue.finish(trial, TrialState.PRUNED, reason=str(error))
        except Incomplete as error:
            self.queue.finish(trial, TrialState.FAIL, reason=str(error))
        except (RuntimeError, ArithmeticError, UserError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            self.queue.finish(trial, TrialState.FAIL, reason=reason)
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
        if result.stopped and not goal.several:  # Optuna prunes trials of one value only
            self.queue.report(trial, values[0], result.seen)
            self.queue.finish(trial, TrialState.PRUNED, result=found)
        else:
            self.queue.finish(trial, TrialState.COMPLETE, values, result=found)

    def _known(self, point: Point) -> TrialResult | None:
        """What another trial found for the same point: samplers repeat themselves."""
        if self.grid:
            return None
        for other in self.queue.trials(TrialState.COMPLETE, TrialState.PRUNED):
            if RESULT in other.user_attrs and self.space.point(other.params).key == point.key:
                return TrialResult.from_json(other.user_attrs[RESULT])
        return None

    def _rivals(self, point: Point) -> list[Rival]:
        """What the best trial so far, of those that this one may be pruned for, asks of it."""
        goal = self.goal
        if goal.prune_by is None:
            return []
        ratio = ratio_of(self.examiner.jobs(point), self.examiner.roles) or 1.0
        best = [r for _, r in finished(self.queue.trials()) if goal.comparable(r, ratio)]
        if not best:
            return []
        return rivals_of(min(best, key=goal.order), goal.prune_by, self.original)
