"""How a search chooses the values of its trials, one row a sampler."""

from collections.abc import Callable
from dataclasses import dataclass

import optuna

from tensorllm.search.storage import stable

STARTUP, POPULATION = 10, 50  # TPE's first trials, drawn at random; NSGA-II's generation


@dataclass(frozen=True, slots=True)
class Sampler:
    """A way to choose values.

    Attributes:
        name: what `--sampler` calls it.
        make: Optuna's sampler of a seed and a number of workers.
        queued: the values of all trials are known, and queued, before the first one.
        independent: how many of the next trials are chosen alike whatever comes out of one of
            them, by the number of trials that have ended.
    """

    name: str
    make: Callable[[int, int], optuna.samplers.BaseSampler]
    queued: bool
    independent: Callable[[int], int]


def _random(seed: int, workers: int) -> optuna.samplers.BaseSampler:
    del workers
    return optuna.samplers.RandomSampler(seed=seed)  # never asked: all values are queued


def _tpe(seed: int, workers: int) -> optuna.samplers.BaseSampler:
    with stable():
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=STARTUP, constant_liar=workers > 1
        )


def _nsga2(seed: int, workers: int) -> optuna.samplers.BaseSampler:
    del workers
    return optuna.samplers.NSGAIISampler(seed=seed, population_size=POPULATION)


ROWS = (
    Sampler("grid", _random, queued=True, independent=lambda ended: 2**31),
    Sampler("tpe", _tpe, queued=False, independent=lambda ended: max(1, STARTUP - ended)),
    Sampler(
        "nsga2", _nsga2, queued=False, independent=lambda ended: POPULATION - ended % POPULATION
    ),
)
SAMPLERS = {row.name: row for row in ROWS}  # of all names in requests.search.SAMPLERS
