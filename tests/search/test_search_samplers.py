"""What the search knows of each sampler, held against Optuna's own."""

import optuna
import pytest

from tensorllm.requests import search as asked
from tensorllm.search.samplers import SAMPLERS, Sampler


def test_every_sampler_that_may_be_asked_for_has_a_row():
    assert tuple(SAMPLERS) == asked.SAMPLERS


def drawn(sampler: Sampler, count: int, sign: int) -> list[float]:
    """Values of trials one after another, each asked for when the last one has its result."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=sampler.make(7, 1))
    out = []
    for number in range(count):
        trial = study.ask()
        # Of a single value NSGA-II makes a new one in every child: it mutates one in all.
        out += [trial.suggest_float(name, 0.0, 1.0) for name in "xyz"]
        study.tell(trial, sign * (number + out[-1]))
    return out


@pytest.mark.parametrize("name", [name for name, row in SAMPLERS.items() if not row.queued])
def test_independent_trials_are_drawn_alike_whatever_comes_out(name: str):
    sampler = SAMPLERS[name]
    count = sampler.independent(0)
    assert count > 1
    one, other = (drawn(sampler, 2 * count, sign) for sign in (1, -1))
    assert one[: 3 * count] == other[: 3 * count]
    assert one != other  # but what follows learns from the results
    assert sampler.independent(count) >= 1
