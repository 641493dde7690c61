"""Freed memory goes back to the system, layer by layer."""

import os
from pathlib import Path

import pytest
import torch

from tensorllm.calibration import store
from tensorllm.calibration.heap import _trim, trim_heap
from tensorllm.calibration.store import Store, Sweep

STATM = Path("/proc/self/statm")
EACH, COUNT = 12_500, 2_000  # numbers of a tensor of 50 kB, and 100 MB of such tensors


def resident() -> int:
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not STATM.is_file(), reason="needs Linux's /proc")
def test_pages_between_tensors_that_stay_go_back() -> None:
    if not hasattr(_trim(), "argtypes"):
        pytest.skip("this C library has no malloc_trim")
    tensors = [torch.ones(EACH) for _ in range(COUNT)]
    staying = tensors[::50]
    del tensors
    before = resident()
    trim_heap()
    assert before - resident() > 4 * EACH * COUNT / 2
    assert all(bool((each == 1).all()) for each in staying)


def test_a_walk_gives_back_after_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Store()
    seen: list[bool] = []
    monkeypatch.setattr(store, "trim_heap", lambda: seen.append(held.has("hidden-0-0")))
    for layer, (states,), after in Sweep(held, "found", ("hidden",), [torch.zeros(1, 2, 3)], 3):
        assert len(seen) == layer
        after([hidden + 1 for hidden in states])
    assert seen == [False] * 3  # what the layer began with had been dropped


def test_without_malloc_trim_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: None) -> object:
        raise OSError

    monkeypatch.setattr("ctypes.CDLL", missing)
    assert _trim.__wrapped__()(0) == 0
