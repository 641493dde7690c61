"""Giving trials up: the error level by simulation, the certain rule by brute force."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorllm.search.stopping import Race, Rival

N = 240


def stops(rival, trial, level, stage=30):
    """How many examples were seen when the trial was pruned, or None."""
    race = Race(Rival(tuple(rival), 0.0), len(trial), level)
    for at in range(0, len(trial), stage):
        part = trial[at : at + stage]
        if race.lost(part, [0.0] * len(part)):
            return race.seen
    return None


def shuffled_pair(seed, rival_only, trial_only, both):
    pairs = [(1, 0)] * rival_only + [(0, 1)] * trial_only + [(1, 1)] * both
    pairs += [(0, 0)] * (N - len(pairs))
    random.Random(seed).shuffle(pairs)
    return [p[0] for p in pairs], [p[1] for p in pairs]


@pytest.mark.parametrize("disagree", [10, 60, 120])
@pytest.mark.parametrize("level", [0.05, 0.2])
def test_an_equal_trial_is_given_up_with_at_most_the_stated_probability(disagree, level):
    runs = 1500
    pairs = (shuffled_pair(seed, disagree, disagree, 0) for seed in range(runs))
    wrong = sum(stops(*pair, level) is not None for pair in pairs)
    assert wrong / runs <= level + 3 * (level * (1 - level) / runs) ** 0.5


def test_a_clear_loser_is_given_up_early():
    seen = [stops(*shuffled_pair(seed, 96, 12, 48), 0.001) for seed in range(50)]
    assert all(seen)
    assert sum(seen) / 50 < 0.4 * N
    certain = [stops(*shuffled_pair(seed, 96, 12, 48), 0.0) for seed in range(50)]
    assert sum(certain) / 50 > 1.5 * sum(seen) / 50  # what the bet is for


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_level_zero_gives_up_exactly_what_can_no_longer_catch_up(pairs):
    rival, trial = zip(*pairs, strict=True)
    seen = stops(rival, list(trial), 0.0, stage=7)
    first = next(
        (
            end
            for end in [*range(7, len(pairs), 7), len(pairs)]
            if sum(trial[:end]) + len(pairs) - end < sum(rival)
        ),
        None,
    )
    assert seen == first


@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=40),
    st.floats(0.01, 10),
)
def test_losses_are_compared_only_when_certain(losses, mean):
    race = Race(Rival(None, mean), len(losses), 0.5)
    if race.lost([None] * len(losses), losses):
        assert sum(losses) / len(losses) > mean
