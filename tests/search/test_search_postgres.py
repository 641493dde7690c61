"""A study in a real PostgreSQL: workers killed, the server gone, everything found once."""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from optuna.trial import TrialState
from postgres import Server, binaries, running

from tensorllm.errors import Incomplete, UserError
from tensorllm.requests.search import SearchRequest
from tensorllm.search import storage
from tensorllm.search.objectives import OBJECTIVES
from tensorllm.search.queue import RESULT, TrialQueue
from tensorllm.search.selection import ranked
from tensorllm.search.study import Study

SMALL = SearchRequest(
    model="demo", dataset="demo", mode="laser", rho=(0.01, 0.05, 0.2), limit=40, cache_gib=2**-6
)
POINTS = 4 * 3 * 2  # layers, rhos, matrices
KILLS = 10


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    programs = binaries()
    if programs is None:
        pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="no driver: pip install 'psycopg[binary]'")
    with running(programs) as found:
        yield found


@pytest.fixture(scope="module")
def small() -> Study:
    """One model and its data for all studies of this module."""
    search = Study(SMALL)
    _ = search.examiner
    return search


@pytest.fixture
def quick_hearts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker is taken for dead after three seconds without a sign of life, not thirty."""
    monkeypatch.setattr(storage, "HEARTBEAT", 1)


def stored(small: Study, url: str, folder: Path) -> Study:
    """The same search with its trials in the database, under the folder's name."""
    search = Study(replace(SMALL, storage=url, study=folder))
    search.__dict__.update(
        {name: small.__dict__[name] for name in ("model", "tokenizer", "datasets", "examiner")}
    )
    return search


QUEUES: list[TrialQueue] = []


@pytest.fixture(autouse=True)
def closed_afterwards() -> Iterator[None]:
    yield
    while QUEUES:
        QUEUES.pop().close()


def opened(search: Study, folder: Path) -> TrialQueue:
    QUEUES.append(queue := search.queue(folder))
    search.fill(queue)
    return queue


def _body(search: Study, folder: Path) -> None:
    search.work(opened(search, folder))
    os._exit(0)


def finish(search: Study, folder: Path) -> TrialQueue:
    """Work until nothing is left, waiting for the dead to be taken for dead."""
    queue = opened(search, folder)
    while queue.waiting() or queue.running():
        search.work(queue)
        search.fill(queue)
        time.sleep(0.2)
    return queue


def results(search: Study, queue: TrialQueue) -> dict[str, str]:
    """Point -> verdicts; each point must be there once, and finished."""
    trials = queue.trials()
    assert {t.state for t in trials} <= {TrialState.COMPLETE, TrialState.PRUNED}
    keys = [search.space.point(t.params).key for t in trials]
    assert len(keys) == len(set(keys)) == POINTS
    return {
        key: t.user_attrs[RESULT]["correct"]
        for key, t in zip(keys, trials, strict=True)
        if not t.user_attrs[RESULT]["stopped"]
    }


def winner(search: Study, queue: TrialQueue) -> str:
    return search.space.point(ranked(queue.trials(), OBJECTIVES["accuracy"])[0][0].params).key


@pytest.mark.slow
@pytest.mark.usefixtures("quick_hearts")
def test_three_workers_killed_and_continued(small: Study, server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    small.work(queue := opened(small, tmp_path / "file"))
    undisturbed, best = results(small, queue), winner(small, queue)

    folder = tmp_path / "killed"
    search = stored(small, server.url, folder)
    context = multiprocessing.get_context("fork")  # the model is loaded already
    moments = random.Random(3)
    for _ in range(KILLS):
        children = [context.Process(target=_body, args=(search, folder)) for _ in range(3)]
        for child in children:
            child.start()
        time.sleep(moments.uniform(0.2, 1.2))
        for child in children:
            os.kill(child.pid or 0, signal.SIGKILL)
            child.join()
    queue = finish(search, folder)
    found = results(search, queue)
    for key in found.keys() & undisturbed.keys():
        assert found[key] == undisturbed[key]
    assert winner(search, queue) == best


@pytest.mark.usefixtures("quick_hearts")
def test_a_server_that_goes_away_is_one_line_and_the_study_goes_on(
    small: Study, server: Server, tmp_path: Path
) -> None:
    folder = tmp_path / "away"
    search = stored(small, server.url, folder)
    queue = opened(search, folder)
    server.stop()
    try:
        with pytest.raises(Incomplete, match="run the same command again to go on") as end:
            search.work(queue)
        assert "\n" not in str(end.value)
        with pytest.raises(Incomplete, match="cannot reach the storage postgresql://tensorllm@127"):
            search.queue(folder)
    finally:
        server.start()
    assert len(results(search, finish(search, folder))) >= 1


def test_passwords_are_not_shown_and_nonsense_is_refused(small: Study, tmp_path: Path) -> None:
    nobody = "postgresql://me:secret@127.0.0.1:1/db"
    with pytest.raises(Incomplete, match="cannot reach the storage") as end:
        stored(small, nobody, tmp_path).queue(tmp_path)
    assert "secret" not in str(end.value)
    assert "\n" not in str(end.value)
    for url, message in (("nosuch://host/db", "not usable"), ("nonsense", "must be a URL")):
        with pytest.raises(UserError, match=message):
            stored(small, url, tmp_path).queue(tmp_path)
