"""What the search knows of each sampler, held against Optuna's own."""

import math
import random
from collections.abc import Mapping

import optuna
import pytest
from tiny_models import tiny_model

from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.options import Value
from tensorllm.requests import search as asked
from tensorllm.search.samplers import SAMPLERS, Sampler
from tensorllm.search.space import LAYER, Space, spread
from tensorllm.search.worker import suggest


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


@pytest.mark.parametrize("name", [name for name, row in SAMPLERS.items() if not row.queued])
def test_a_study_that_goes_on_draws_what_it_would_have_drawn(name: str):
    def points(stops: set[int], count: int = 120) -> list[dict[str, float]]:
        study = optuna.create_study(sampler=SAMPLERS[name].make(7, 1))
        for number in range(count):
            if number in stops:  # another process, killed in the middle of a trial's values
                study.sampler = SAMPLERS[name].make(7, 1)
            trial = study.ask()
            first = trial.suggest_float("x", 0.0, 1.0)
            if number in stops:
                study.sampler = SAMPLERS[name].make(7, 1)
                trial = optuna.Trial(study, trial._trial_id)
            study.tell(trial, first + trial.suggest_float("y", 0.0, 1.0))
        return [trial.params for trial in study.trials]

    undisturbed = points(set())
    assert points({3, 8, 20, 61, 62}) == undisturbed
    assert len({tuple(values.items()) for values in undisturbed[:10]}) == 10


LAYERS, TRIALS, SEEDS = 30, 60, 16
DECOY = LAYERS - 1  # a layer that gains a little with any rank


def accuracy(values: Mapping[str, Value], best: int, share: float, noise: random.Random) -> float:
    """Of a planted model: one layer gains six points at the right rank, each layer further away a
    `share` of that; the decoy gains up to two and a half; as noisy as some hundred questions."""
    layer, far = int(values[LAYER]), abs(math.log(float(values["rho"]) / 0.2))
    gain = 6 * share ** abs(layer - best) * max(0.0, 1 - far / 3)
    decoy = 2.5 * max(0.0, 1 - far / 4) if layer == DECOY else -1.0
    return 12 + max(gain, decoy) + noise.gauss(0, 0.8)


def best_layer(seed: int, best: int, share: float) -> tuple[int, set[int]]:
    """The layer of the best trial of TPE, and all layers that were tried."""
    study = optuna.create_study(direction="maximize", sampler=SAMPLERS["tpe"].make(seed, 1))
    noise = random.Random(seed)
    for values in spread(SPACE, TRIALS, seed):
        study.enqueue_trial(dict(values))
    for _ in range(TRIALS):
        trial = study.ask()
        study.tell(trial, accuracy(suggest(trial, SPACE, queued=False), best, share, noise))
    return study.best_params[LAYER], {trial.params[LAYER] for trial in study.trials}


LLAMA = tiny_model("llama")
SPACE = Space(
    "laser",
    RoleMatrices(LLAMA.config, parameters_of(LLAMA)).spec,
    {LAYER: tuple(range(LAYERS)), "rho": (0.01, 0.1, 0.99), "matrices": ("in", "gate", "out")},
    log=frozenset(["rho"]),
)


@pytest.mark.parametrize(("share", "least"), [(0.0, 10), (0.6, 15)])
def test_tpe_sees_every_layer_and_finds_a_planted_optimum(share: float, least: int):
    """Alone among layers that lose, and (as in real models) with neighbours that gain, too."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found = 0
    for seed in range(SEEDS):
        best = (7 * seed + 3) % DECOY
        layer, seen = best_layer(seed, best, share)
        assert seen == set(range(LAYERS))
        found += layer == best
    assert found >= least
