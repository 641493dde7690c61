"""Several batches at once: the same rows in the same order, and the threads are given back."""

from collections.abc import Iterator
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tensorllm.commands.evaluate import evaluate
from tensorllm.evaluation.scorer import SMALL, score_all, workers_for
from tensorllm.requests.evaluate import EvaluateRequest


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def scorer(score: Any) -> Any:
    return SimpleNamespace(score=score)


def test_two_batches_run_at_once_and_come_back_in_order(two_threads: None) -> None:
    together = Barrier(2, timeout=60)  # one batch alone would wait here for ever
    inside = []

    def score(batch: int) -> list[int]:
        together.wait()
        inside.append(torch.get_num_threads())
        return [batch]

    assert list(score_all(scorer(score), range(6), workers=2)) == [[n] for n in range(6)]
    assert inside == [1] * 6
    assert torch.get_num_threads() == 2


def test_what_fails_in_a_thread_fails_here_and_gives_the_threads_back(two_threads: None) -> None:
    def score(batch: int) -> list[int]:
        if batch == 1:
            raise ValueError("no score")
        return [batch]

    rows = score_all(scorer(score), range(4), workers=2)
    assert next(rows) == [0]
    with pytest.raises(ValueError, match="no score"):
        next(rows)
    assert torch.get_num_threads() == 2


def test_closed_early_it_begins_no_more_batches(two_threads: None) -> None:
    begun = []

    def score(batch: int) -> list[int]:
        begun.append(batch)
        return [batch]

    rows = score_all(scorer(score), range(1000), workers=2)
    next(rows)
    rows.close()
    assert len(begun) < 1000
    assert torch.get_num_threads() == 2


def test_who_gets_several_workers(two_threads: None) -> None:
    def model(parameters: int, device: str = "cpu") -> Any:
        return SimpleNamespace(device=torch.device(device), num_parameters=lambda: parameters)

    assert workers_for(model(SMALL)) == 2
    assert workers_for(model(SMALL + 1)) == 1
    assert workers_for(model(SMALL, "cuda")) == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert workers_for(model(SMALL)) == 1


def test_an_evaluation_is_the_same_by_one_thread_and_by_two(two_threads: None) -> None:
    request = EvaluateRequest(model="demo", dataset="demo", limit=150, batch_tokens=256)
    two = evaluate(request)
    torch.set_num_threads(1)
    one = evaluate(request)
    assert [row.index for row in two.predictions] == [row.index for row in one.predictions]
    assert [row.correct for row in two.predictions] == [row.correct for row in one.predictions]
    losses = torch.tensor(
        [[row.loss for row in rows] for rows in (two.predictions, one.predictions)]
    )
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
