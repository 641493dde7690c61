"""Fixtures of all tests: the real data that may lie beside the repository, and settings.

Set before anything imports torch or transformers: one thread per test process, and no network.

Tests do not wait for the disk: a process that is killed loses nothing it has written, only a
machine that goes down would. And the million objects that imports and the collection of tests make
live until the end: cycles are not looked for among them, neither meanwhile nor later.
"""
# ruff: noqa: E402

import gc
import os
import time

from repository import ROOT

gc.disable()
os.fsync = lambda fd: None

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

VERBOSITY = "TRANSFORMERS_VERBOSITY"  # which --verbose sets


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """What a test changes for the whole process would make another one fail, or pass."""
    before = os.environ.get(VERBOSITY)
    yield
    if before is None:
        os.environ.pop(VERBOSITY, None)
    else:
        os.environ[VERBOSITY] = before
    on = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert on, "this test left gradients off"


@pytest.fixture(scope="session", autouse=True)
def mutants_end() -> None:
    """Half a minute of computing for all tests of a mutant (`make mutants`): some loop for ever."""
    if "__mutmut_" in os.environ.get("MUTANT_UNDER_TEST", ""):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 30, most))


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small real runs of every kind that `tensorllm report` shows, to be read only."""
    from report_runs import make_runs

    return make_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real models and data that are not in the repository; its tests skip where it is absent."""
    folder = Path(os.environ.get("TENSORLLM_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set TENSORLLM_SHARED to its folder)")
    return folder


@pytest.fixture(scope="session")
def tinystories(shared_dir: Path) -> Path:
    """A really trained LLaMA of 656 thousand parameters, as a local Hugging Face folder."""
    folder = shared_dir / "models" / "tinystories-656K"
    if not folder.is_dir():
        pytest.skip(f"no model at {folder}")
    return folder
