"""Metrics against plain numpy, however the examples are split over batches and devices."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_predictions import rows

from tensorllm.evaluation.predictions import Prediction
from tensorllm.evaluation.totals import columns, metrics_of
from tensorllm.metrics import METRICS, add_answers, answer_metrics
from tensorllm.shown import SHOWN, Shown


def test_against_numpy():
    made = rows(137)
    log_p = np.array([r.log_probability for r in made])
    tokens = np.array([r.answer_tokens for r in made])
    rank = np.array([r.rank for r in made])
    want = {
        "accuracy": 100 * np.mean([r.correct for r in made]),
        "loss": np.mean(-log_p / tokens),
        "perplexity": np.exp(-log_p.sum() / tokens.sum()),
        "top_1": 100 * np.mean(rank <= 1),
        "top_5": 100 * np.mean(rank <= 5),
        "top_10": 100 * np.mean(rank <= 10),
        "token_f1": 100 * np.mean([r.token_f1 for r in made]),
    }
    assert metrics_of(made) == pytest.approx(want, rel=1e-12)
    assert metrics_of(made[::-1]) == metrics_of(made)  # bit for bit


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_batches_do_not_matter(sizes: list[int]):
    made = rows(sum(sizes), seed=len(sizes))
    metrics = answer_metrics()
    start = 0
    for size in sizes:
        add_answers(metrics, columns(made[start : start + size]))
        start += size
    got = {name: float(value) for name, value in metrics.compute().items()}
    assert got == pytest.approx(metrics_of(made), rel=1e-12)


def test_merged_states_are_as_if_seen_by_one():
    """What a device synchronisation does: it adds the states."""
    made = rows(11)
    ours, theirs = answer_metrics(), answer_metrics()
    add_answers(ours, columns(made[:4]))
    add_answers(theirs, columns(made[4:]))
    for name in ours:
        for state in ("total", "count"):
            merged = getattr(ours[name], state) + getattr(theirs[name], state)
            setattr(ours[name], state, merged)
    assert float(ours["loss"].compute()) == pytest.approx(metrics_of(made)["loss"], rel=1e-12)


def test_running_text_has_no_verdict():
    sums = [(-20.0, 10), (-4.0, 2)]
    text = [Prediction(i, "", "t", "", None, log_p, n, 1, 0.0) for i, (log_p, n) in enumerate(sums)]
    got = metrics_of(text)
    assert got == pytest.approx({"loss": 2.0, "perplexity": np.exp(2.0)})


def test_every_metric_is_shown():
    assert list(METRICS) == list(SHOWN)


def test_states_are_float64():
    metrics = answer_metrics()
    add_answers(metrics, columns(rows(3)))
    assert metrics["loss"].total.dtype == torch.float64
    metrics.reset()
    assert metrics["loss"].total.dtype == metrics["loss"].count.dtype == torch.float64


def test_what_is_shown_of_a_change():
    up, down = Shown(name="score", digits=3), Shown(name="loss", unit="nats", upwards=False)
    assert [up.better(change) for change in (-0.5, 0, 0.5)] == [False, True, True]
    assert [down.better(change) for change in (-0.5, 0, 0.5)] == [True, True, False]
    # too small to be seen in a sentence, with one decimal less than a table: neither good nor bad
    assert [up.tone(change) for change in (-0.5, -0.004, 0.004, 0.006)] == ["bad", "", "", "good"]
    assert [down.tone(change) for change in (-0.5, 0.04, 0.06)] == ["good", "", "bad"]
    assert (up.exact(1.23456), up.brief(1.23456)) == ("1.235", "1.23")
    assert (up.title, down.title) == ("score", "loss, nats")
