"""What numbers are made with is told on every system."""

import os

import pytest

from tensorllm.environment import environment


def test_systems_that_bind_no_process_to_cores_count_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS has none
    assert f"{os.cpu_count()} cores" in environment()["hardware"]
