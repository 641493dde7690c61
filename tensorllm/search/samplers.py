"""How a search chooses the values of its trials."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from tensorllm.search.storage import stable

STARTUP, POPULATION = 10, 50  # TPE's random first trials; NSGA-II's generation size


@dataclass(frozen=True, slots=True)
class Sampler:
    """A way to choose values.

    Attributes:
        name: its name for `--sampler`.
        of_seed: makes Optuna's sampler from a seed and a number of workers.
        queued: whether the values of all trials are known, and queued, before the first one.
        independent: how many of the next trials do not depend on each other's results, given the
            number of trials that have ended.
    """

    name: str
    of_seed: Callable[[int, int], BaseSampler]
    queued: bool
    independent: Callable[[int], int]

    def make(self, seed: int, workers: int) -> BaseSampler:
        """The sampler of a study, the same in every process that continues it."""
        return _ByNumber(lambda own: self.of_seed(own, workers), seed)


class _ByNumber(BaseSampler):
    """Seeds each value by its trial's number and its name.

    So a resumed search draws what it would have drawn without the interruption, and not the first
    trials' values again.
    """

    def __init__(self, of_seed: Callable[[int], BaseSampler], seed: int) -> None:
        self.of_seed = of_seed
        self.seed = seed

    def _of(self, trial: FrozenTrial, name: str = "") -> BaseSampler:
        facts = np.random.SeedSequence((self.seed, trial.number, crc32(name.encode())))
        return self.of_seed(int(facts.generate_state(1)[0]))

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        own = self._of(trial, param_name)
        return own.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._of(trial).before_trial(study, trial)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        self._of(trial).after_trial(study, trial, state, values)


def _random(seed: int, workers: int) -> BaseSampler:
    del workers
    return optuna.samplers.RandomSampler(seed=seed)  # never asked: all values are queued


def _tpe(seed: int, workers: int) -> BaseSampler:
    with stable():
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=STARTUP, constant_liar=workers > 1
        )


def _nsga2(seed: int, workers: int) -> BaseSampler:
    del workers
    return optuna.samplers.NSGAIISampler(seed=seed, population_size=POPULATION)


ROWS = (
    Sampler("grid", _random, queued=True, independent=lambda ended: 2**31),
    Sampler("tpe", _tpe, queued=False, independent=lambda ended: max(1, STARTUP - ended)),
    Sampler(
        "nsga2", _nsga2, queued=False, independent=lambda ended: POPULATION - ended % POPULATION
    ),
)
SAMPLERS = {row.name: row for row in ROWS}  # their names are those of requests.search.SAMPLERS
