"""What a worker does with a trial: choose values, examine them, record what came out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import optuna
from optuna.trial import FrozenTrial, TrialState

from tensorllm.compression.plan import plan_jobs
from tensorllm.compressors import Job
from tensorllm.errors import Incomplete, UserError
from tensorllm.registry import one_of
from tensorllm.search.choices import Value
from tensorllm.search.examiner import Examiner, TooFar
from tensorllm.search.feasible import Taken, collides, ratio_of
from tensorllm.search.found import Found, unpack
from tensorllm.search.queue import RESULT, TrialQueue
from tensorllm.search.space import Point, Space
from tensorllm.search.stopping import Rival
from tensorllm.search.storage import stable

Objective = Literal["accuracy", "loss", "pareto"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)
SAMPLERS = ("grid", "tpe", "nsga2")
DIRECTIONS: dict[str, tuple[Literal["minimize", "maximize"], ...]] = {
    "accuracy": ("maximize",),
    "loss": ("minimize",),
    "pareto": ("maximize", "maximize"),
}

Report = Callable[[TrialQueue], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How trials are judged.

    Attributes:
        objective: what is best: accuracy, loss, or accuracy against ratio.
        level: probability with which the best trial may be given up half-way; None: none ever is.
        max_error: relative error allowed; None: any.
        min_ratio: of the numbers in the decomposed matrices to those stored; None: any.
    """

    objective: Objective = "accuracy"
    level: float | None = 0.001
    max_error: float | None = None
    min_ratio: float | None = None

    def __post_init__(self) -> None:
        one_of("--objective", self.objective, OBJECTIVES)
        if self.level is not None and not 0 <= self.level < 1:
            raise UserError(f"--stop-level must be in [0, 1), got {self.level}")
        if self.max_error is not None and self.max_error <= 0:
            raise UserError(f"--max-error must be more than 0, got {self.max_error}")
        if self.min_ratio is not None and self.min_ratio <= 0:
            raise UserError(f"--min-ratio must be more than 0, got {self.min_ratio}")


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
    """Values of all dimensions: the queued ones, or the sampler's within the choices' bounds."""
    return {name: _suggest(trial, name, values, grid) for name, values in space.choices.items()}


def _suggest(trial: optuna.Trial, name: str, values: Sequence[Value], grid: bool) -> Value:
    low, high = values[0], values[-1]
    gaps = name == "layer" and len(values) != int(high) - int(low) + 1
    if grid or gaps or isinstance(low, str):
        chosen = trial.suggest_categorical(name, list(values))
        assert chosen is not None
        return chosen
    if isinstance(low, int):
        return trial.suggest_int(name, low, int(high), log=name != "layer")
    return trial.suggest_float(name, float(low), float(high), log=True)


class Worker:
    """Takes trials from the queue and examines them; what is `taken` is not edited again."""

    def __init__(
        self,
        queue: TrialQueue,
        space: Space,
        examiner: Examiner,
        rules: Rules,
        *,
        grid: bool,
        taken: Taken = frozenset(),
    ) -> None:
        self.queue = queue
        self.space = space
        self.examiner = examiner
        self.rules = rules
        self.grid = grid
        self.taken = taken

    def run(self, report: Report | None = None) -> None:
        """Work until the queue is empty; `report` is called after each trial."""
        while (trial := self.queue.take()) is not None:
            self.examine(trial)
            if report is not None:
                report(self.queue)

    def examine(self, trial: optuna.Trial) -> None:
        """One trial, to its end: whatever goes wrong with it is its result."""
        values = suggest(trial, self.space, grid=self.grid)
        if (reason := self._infeasible(values)) is not None:
            self.queue.finish(trial, TrialState.PRUNED, reason=reason)
            return
        point = self.space.point(values)
        try:
            twin = self._twin(trial, point)
            found = twin or self.examiner(
                point,
                None if self.rules.level is None else self._rival(point),
                level=self.rules.level or 0.0,
                max_error=self.rules.max_error,
            )
        except TooFar as error:
            self.queue.finish(trial, TrialState.PRUNED, reason=f"{error}, more than allowed")
        except Incomplete as error:
            self.queue.finish(trial, TrialState.FAIL, reason=str(error))
        except (RuntimeError, ArithmeticError, UserError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            self.queue.finish(trial, TrialState.FAIL, reason=reason)
        else:
            self._finish(trial, found)

    def _infeasible(self, values: dict[str, Value]) -> str | None:
        if not self.space.allows(values):
            return "a rank is more than the product of the others"
        least = self.rules.min_ratio
        if least is None and not self.taken:
            return None
        jobs = self._jobs(self.space.point(values))
        if collides(jobs, self.taken):
            return "a matrix is edited already"
        ratio = ratio_of(jobs, self.examiner.roles)
        if least is None or ratio >= least:
            return None
        return f"ratio {ratio:.3g}, less than asked"

    def _jobs(self, point: Point) -> list[Job]:
        return plan_jobs(point.compressor, self.examiner.roles, point.layers)

    def _finish(self, trial: optuna.Trial, found: Found) -> None:
        objective = self.rules.objective
        result = found.to_json()
        if objective == "pareto":  # Optuna prunes one objective only; selection leaves these out
            values = [found.accuracy or 0.0, found.ratio]
            self.queue.finish(trial, TrialState.COMPLETE, values, result=result)
            return
        value = found.loss if objective == "loss" else found.accuracy or 0.0
        if found.stopped:
            self.queue.report(trial, value, found.seen)
            self.queue.finish(trial, TrialState.PRUNED, result=result)
        else:
            self.queue.finish(trial, TrialState.COMPLETE, [value], result=result)

    def _twin(self, trial: optuna.Trial, point: Point) -> Found | None:
        """What another trial found for the same point: samplers repeat themselves."""
        if self.grid:
            return None
        for other in self.queue.trials(TrialState.COMPLETE, TrialState.PRUNED):
            if RESULT in other.user_attrs and self.space.point(other.params).key == point.key:
                return Found(**other.user_attrs[RESULT])
        return None

    def _rival(self, point: Point) -> Rival | None:
        """The best trial so far; for `pareto`, of those that are not larger."""
        best = [found for _, found in finished(self.queue.trials())]
        if self.rules.objective == "pareto":
            ratio = ratio_of(self._jobs(point), self.examiner.roles)
            best = [found for found in best if found.ratio >= ratio]
        if not best:
            return None
        objective = self.rules.objective
        found = min(
            best, key=lambda f: merit(f, "accuracy" if objective == "pareto" else objective)
        )
        if objective == "loss":
            return Rival(None, found.loss)
        return Rival(unpack(found.correct, found.seen), found.loss)


def finished(trials: Sequence[FrozenTrial]) -> list[tuple[FrozenTrial, Found]]:
    """The trials that were examined in full, with what they found."""
    full = [t for t in trials if t.state == TrialState.COMPLETE and RESULT in t.user_attrs]
    pairs = [(t, Found(**t.user_attrs[RESULT])) for t in full]
    return [(t, found) for t, found in pairs if not found.stopped]


def merit(found: Found, objective: str) -> tuple[Any, ...]:
    """Smaller is better: the objective, ties by loss, then by size."""
    first = (found.loss,) if objective == "loss" else (-(found.accuracy or 0.0), found.loss)
    return (*first, -found.parameters_saved)
