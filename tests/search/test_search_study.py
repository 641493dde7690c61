"""A study survives whatever happens to its workers, and refuses what it was not begun with."""

import json
import multiprocessing
import os
import random
import resource
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path

import optuna
import pytest
import torch
from optuna.trial import TrialState
from rich.console import Console

from tensorllm.commands.search import run
from tensorllm.errors import Incomplete, UserError
from tensorllm.reporting.search import search_tables
from tensorllm.requests.search import SearchRequest
from tensorllm.search.objectives import OBJECTIVES
from tensorllm.search.queue import RESULT, TrialQueue
from tensorllm.search.selection import ranked
from tensorllm.search.storage import JOURNAL, Claims, FileLock
from tensorllm.search.study import Study
from tensorllm.search.worker import Worker

SMALL = SearchRequest(
    model="demo",
    dataset="demo",
    mode="laser",
    rho=(0.01, 0.05, 0.2),
    limit=40,
    cache_gib=2**-6,
)
POINTS = 4 * 3 * 2  # layers, rhos, matrices


@pytest.fixture(scope="module")
def small():
    """One model and its data for all studies of this module."""
    search = Study(SMALL)
    _ = search.examiner
    return search


def opened(search: Study, folder: Path) -> TrialQueue:
    queue = search.queue(folder)
    search.fill(queue)
    return queue


def outcome(search: Study, folder: Path) -> tuple[dict[str, tuple], str]:
    """Per point how often it was finished and its verdicts (if it came to its end); the winner."""
    queue = search.queue(folder)
    found: dict[str, list] = {}
    for trial in queue.trials():
        assert trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
        found.setdefault(search.space.point(trial.params).key, []).append(trial.user_attrs[RESULT])
    winner = ranked(queue.trials(), OBJECTIVES["accuracy"])[0][0]
    whole = {
        key: (len(rs), rs[0]["correct"] if not rs[0]["stopped"] else "")
        for key, rs in found.items()
    }
    return whole, search.space.point(winner.params).key


@pytest.fixture(scope="module")
def undisturbed(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    small.work(opened(small, folder))
    return outcome(small, folder)


def _body(search: Study, folder: Path) -> None:
    search.work(opened(search, folder))
    os._exit(0)


@pytest.mark.parametrize("workers", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_continued(small, undisturbed, tmp_path, workers):
    context = multiprocessing.get_context("fork")  # the model is loaded already
    moments = random.Random(workers)
    killed = 0
    while killed < 20:
        children = [context.Process(target=_body, args=(small, tmp_path)) for _ in range(workers)]
        for child in children:
            child.start()
        time.sleep(moments.uniform(0.02, 0.25))
        for child in children:
            child.kill()
            child.join()
        killed += 1
    small.work(opened(small, tmp_path))
    points, winner = outcome(small, tmp_path)
    assert len(points) == POINTS
    assert {count for count, _ in points.values()} == {1}
    assert winner == undisturbed[1]
    for key, (_, correct) in points.items():
        assert correct in ("", undisturbed[0][key][1]) or undisturbed[0][key][1] == ""


def test_nobody_takes_a_trial_twice(small, tmp_path):
    """As where another process has emptied the queue while this one takes several at once."""
    queue = opened(small, tmp_path)
    taken = [queue.take() for _ in range(POINTS)]
    assert len({trial.number for trial in taken}) == POINTS
    assert queue.take() is None
    dead = opened(small, tmp_path)  # of the same process, which the lock does not keep out
    assert dead.take().number == taken[0].number


def test_everything_runs_again_without_work(small, tmp_path):
    small.work(opened(small, tmp_path))
    before = (tmp_path / JOURNAL).read_bytes()
    small.work(opened(small, tmp_path))
    assert (tmp_path / JOURNAL).read_bytes() == before


def test_a_torn_last_line_is_cut_and_no_trial_lost(small, tmp_path):
    queue = opened(small, tmp_path)
    with (tmp_path / JOURNAL).open("ab") as journal:
        journal.write(b'{"op_code": 6, "trial_i')
    small.work(opened(small, tmp_path))
    assert len(ranked(queue.trials(), OBJECTIVES["accuracy"])) <= POINTS == len(queue.trials())
    for line in (tmp_path / JOURNAL).read_bytes().splitlines():
        json.loads(line)


def test_a_damaged_file_is_kept_aside(small, tmp_path):
    opened(small, tmp_path)
    journal = tmp_path / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    damaged = b"".join([*lines[:3], b"\x00\x01 not json\n", *lines[3:]])
    journal.write_bytes(damaged)
    with pytest.raises(UserError, match=r"damaged at line 4; it is kept as trials.journal.damaged"):
        small.queue(tmp_path)
    assert (tmp_path / f"{JOURNAL}.damaged").read_bytes() == damaged
    opened(small, tmp_path)  # the same command begins anew


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"protocol": "paper"}, "protocol was 'strict' and is 'paper'"),
        ({"limit": 41}, r"dataset\S* was"),
        ({"rho": (0.01,)}, r"space.choices.rho was \[.*\] and is \[0.01\]\. Choose another"),
        ({"objective": "loss"}, "directions|objective"),
        ({"seed": 5}, "seed was 0 and is 5"),
    ],
)
def test_another_search_is_refused_and_told_what_differs(small, tmp_path, change, named):
    small.queue(tmp_path)
    with pytest.raises(UserError, match=named):
        Study(replace(SMALL, **change)).queue(tmp_path)


def out_of_memory(rows):
    raise torch.OutOfMemoryError("tried to allocate 99 bytes\nsecond line")


def not_a_number(rows):
    return [replace(row, log_probability=float("nan")) for row in rows]


@pytest.mark.parametrize(
    ("break_", "reason"),
    [
        (out_of_memory, "OutOfMemoryError: tried to allocate 99 bytes"),
        (not_a_number, "FloatingPointError: the model's loss is nan"),
    ],
)
def test_a_failing_trial_is_recorded_and_the_search_goes_on(
    small, tmp_path, monkeypatch, break_, reason
):
    examine = type(small.examiner)._rows

    def broken(self, edits, rivals, level):
        return [
            ([break_(rows[0])] if edit.sites and edit.sites[0].site.layers == (2,) else rows, ended)
            for edit, (rows, ended) in zip(edits, examine(self, edits, rivals, level), strict=True)
        ]

    monkeypatch.setattr(type(small.examiner), "_rows", broken)
    queue = opened(small, tmp_path)
    small.work(queue)
    failed = [t for t in queue.trials() if t.state == TrialState.FAIL]
    assert len(failed) == POINTS / 4
    assert {t.user_attrs["reason"] for t in failed} == {reason}
    assert not queue.waiting()
    assert not queue.running()
    monkeypatch.undo()
    before = (tmp_path / JOURNAL).read_bytes()
    small.work(opened(small, tmp_path))  # what failed is not tried again
    assert (tmp_path / JOURNAL).read_bytes() == before


def _work_until_full(search: Study, folder: Path, room: int, reported) -> None:
    size = (folder / JOURNAL).stat().st_size + room
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        search.work(search.queue(folder))
    except Incomplete as error:
        reported.send(str(error))
    reported.close()
    os._exit(0)


@pytest.mark.parametrize("room", [0, 700, 3000])
def test_a_full_disk_is_one_line_and_the_study_goes_on(small, undisturbed, tmp_path, room):
    opened(small, tmp_path)
    context = multiprocessing.get_context("fork")
    reported, tell = context.Pipe(duplex=False)
    child = context.Process(target=_work_until_full, args=(small, tmp_path, room, tell))
    child.start()
    tell.close()
    message = reported.recv()
    child.join()
    assert "cannot be written" in message
    assert "run the same command again to go on" in message
    assert "\n" not in message
    small.work(opened(small, tmp_path))
    points, winner = outcome(small, tmp_path)
    assert [count for count, _ in points.values()] == [1] * POINTS
    assert winner == undisturbed[1]


@pytest.mark.parametrize("objective", ["accuracy", "pareto"])
@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_samplers_make_exactly_the_trials_asked_for(small, tmp_path, objective, sampler):
    request = replace(SMALL, sampler=sampler, trials=14, objective=objective, min_ratio=2.0)
    search = Study(request)
    search.__dict__.update(model=small.model, tokenizer=small.tokenizer)
    queue = opened(search, tmp_path)
    search.work(queue)
    while queue.waiting() == 0 and (search.fill(queue), queue.waiting())[1]:
        search.work(queue)
    found = [t for t in queue.trials() if RESULT in t.user_attrs]
    assert len(found) == 14
    assert all(t.user_attrs[RESULT]["ratio"] >= 2.0 for t in found)


@pytest.mark.parametrize(
    ("sampler", "trials", "deaths"), [("tpe", 24, (3, 12, 19)), ("nsga2", 60, (1, 17, 33, 49))]
)
def test_a_killed_search_makes_the_trials_of_an_undisturbed_one(
    small, tmp_path, sampler, trials, deaths
):
    """Killed in the middle of a trial: what comes after it learns from its result."""
    search = Study(replace(SMALL, sampler=sampler, trials=trials))
    search.__dict__.update(model=small.model, tokenizer=small.tokenizer)

    def die(after: int) -> None:
        def on_trial(search: Study, queue: TrialQueue) -> None:
            if sum(t.state.is_finished() for t in queue.trials()) >= after:
                assert queue.take() is not None
                os._exit(0)

        search.work(opened(search, tmp_path / "killed"), on_trial)

    for after in deaths:
        child = multiprocessing.get_context("fork").Process(target=die, args=(after,))
        child.start()
        child.join()
        assert child.exitcode == 0
    found = []
    for name in ("killed", "undisturbed"):
        queue = opened(search, tmp_path / name)
        search.work(queue)
        found.append([(t.number, t.params, t.state, t.values) for t in queue.trials()])
    assert found[0] == found[1]


def test_trials_that_were_left_are_examined_as_many_at_once(small, tmp_path, monkeypatch):
    """What a trial is pruned beside depends on which ones are examined together."""
    search = Study(replace(SMALL, sampler="nsga2", trials=24))
    search.__dict__.update(model=small.model, tokenizer=small.tokenizer)
    assert search.examiner.side_by_side == 16
    dead = opened(search, tmp_path)
    assert all(dead.take() is not None for _ in range(16))
    together: list[list[int]] = []
    monkeypatch.setattr(
        Worker, "examine", lambda _, trials: together.append([t.number for t in trials])
    )
    search.work(opened(search, tmp_path))
    assert together == [list(range(16)), list(range(16, 24))]


def test_the_best_points_are_told_once_each():
    """TPE comes back to what was good: of 8 points 20 trials try some again."""
    request = replace(SMALL, sampler="tpe", trials=20, rho=(0.01,), full=True)
    top = run(request).results["top"]
    assert 1 < len(top) <= 8
    assert len({json.dumps(row["params"], sort_keys=True) for row in top}) == len(top)


def test_what_is_told_of_a_search_by_loss_is_about_the_loss():
    """The luck of a choice by accuracy is not that of this choice."""
    found = run(replace(SMALL, objective="loss", rho=(0.05,), layers=(2, 3)))
    assert found.results["winner"]["test"]["accuracy"] is not None
    assert found.results["selection"] is None
    assert "loss on the test part" in " ".join(found.recipe.split())
    assert "accuracy" not in found.recipe


def test_progress_counts_the_trials_asked_for_then_the_test_part():
    reported: list[tuple[int, int, str]] = []
    request = replace(SMALL, sampler="tpe", trials=14, min_ratio=4.0)
    found = run(request, lambda *update: reported.append(update))
    assert found.results["trials"]["infeasible"] > 0
    trials = [each for each in reported if not each[2].endswith("test")]
    assert {total for _, total, _ in trials} == {14}
    assert [done for done, _, _ in trials] == sorted(done for done, _, _ in trials)
    assert trials[-1][0] == 14
    scored = reported[len(trials) :]
    assert scored[0][2] == "original on test"
    assert scored[-1] == (80, 80, "winner on test")


def test_a_database_serves_as_storage_and_lost_trials_are_queued_again(small, tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    search = Study(replace(SMALL, storage=url, rho=(0.01,)))
    search.__dict__.update(model=small.model, tokenizer=small.tokenizer)
    queue = opened(search, tmp_path)
    trial = queue.take()
    queue.release(trial.number)
    queue.heart.grace_period = -1  # its worker is dead as soon as it stops beating
    time.sleep(1.1)
    search.work(opened(search, tmp_path))
    search.work(queue)
    queue.study.enqueue_trial(dict(search.points[0]))  # as if another machine had done it too
    search.work(queue)
    points = [search.space.point(t.params).key for t in queue.trials()]
    assert len(points) == len(set(points)) == POINTS / 3
    assert all(RESULT in t.user_attrs for t in queue.trials())


def test_locks_end_with_their_process(tmp_path):
    def hold() -> None:
        journal = tmp_path / "j"
        journal.touch()
        lock, claims = FileLock(journal), Claims(tmp_path / "claims")
        assert lock.acquire()
        assert claims.take(7)
        (tmp_path / "held").touch()
        time.sleep(60)

    child = multiprocessing.get_context("fork").Process(target=hold)
    child.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    claims = Claims(tmp_path / "claims")
    assert not claims.take(7)
    assert claims.take(8)
    child.kill()
    child.join()
    assert claims.take(7)
    assert FileLock(tmp_path / "j").acquire()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"trials": 0}, "at least 1, got 0"),
        ({"sampler": "gird"}, "grid, tpe, nsga2, got 'gird'"),
        ({"workers": 99}, r"--workers must be 1\.\."),
        ({"workers": 0}, r"--workers must be 1\.\."),
        ({"storage": "nosuch://host/db"}, "not usable"),
        ({"together": 9}, r"--together must be in 1\.\.4, got 9"),
        ({"min_ratio": 1e9}, "best reachable is"),
        ({"layers": (9,)}, r"0\.\.3, got 9"),
        ({"dataset": "deno"}, "Did you mean 'demo'"),
    ],
)
def test_bad_requests_are_refused(wrong, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(replace(SMALL, study=tmp_path, **wrong))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"calibration": "latin.txt"}, "must be UTF-8"),
        ({"calibration": "good.txt", "sampled": "nowhere.txt"}, "cannot read the text"),
        ({"storage": "sqlite:////nowhere/trials.db"}, "cannot reach the storage"),
    ],
)
def test_what_cannot_be_opened_is_refused_before_the_model_is_loaded(
    wrong, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes("naïve".encode("latin-1"))
    Path("good.txt").write_text("Ada lives in Oslo. " * 99)
    monkeypatch.setattr("tensorllm.checkpoint.loader.Loader.__call__", None)
    paths = {name: x if name == "storage" else Path(x) for name, x in wrong.items()}
    with pytest.raises((UserError, Incomplete), match=message):
        run(replace(SMALL, study=tmp_path / "study", **paths))


@pytest.mark.parametrize(
    "wrong", [{"sampler": "gird"}, {"stop_level": 1.0}, {"max_error": 0.0}, {"min_ratio": -1.0}]
)
def test_bad_rules_are_refused(wrong):
    with pytest.raises(UserError, match="must be"):
        replace(SMALL, **wrong)


def test_when_to_stop_trials_and_to_stop_none_are_not_given_both():
    with pytest.raises(UserError, match="--stop-level does nothing with --full"):
        replace(SMALL, stop_level=0.1, full=True)


def test_optuna_is_quiet():
    assert optuna.logging.get_verbosity() == optuna.logging.ERROR


def test_running_text_is_cut_to_the_model_s_context_and_has_no_accuracy(tmp_path, caplog):
    text = tmp_path / "words.txt"
    text.write_text(" ".join(["Ada Moss plays banjo ."] * 60))  # blocks are longer than the demo's
    asked = replace(SMALL, dataset="text", data_file=text, limit=2, layers=(3,), rho=(0.05,))
    found = run(replace(asked, objective="loss", matrices=("in",)))
    assert found.results["winner"]["test"]["examples"] == 2
    with Console(file=StringIO()) as console, console.capture() as shown:
        console.print(search_tables(found.results))
    assert "loss" in shown.get()
    assert "accuracy" not in shown.get() + caplog.text
