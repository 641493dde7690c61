"""Results folders: complete or not there, resumed, compared; and the statistics in them."""

import json
import math
import shutil
import threading
import time
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import eval_world as world
import numpy as np
import pytest
from random_predictions import rows as random_rows

from tensorllm.checkpoint.loader import Loader
from tensorllm.commands.compress import run
from tensorllm.commands.evaluate import evaluate
from tensorllm.errors import Incomplete, UserError
from tensorllm.evaluation.predictions import Prediction
from tensorllm.evaluation.results import ResultsFolder, compare, read_results
from tensorllm.evaluation.statistics import compared, intervals, mcnemar, resampled_means
from tensorllm.evaluation.totals import metrics_of
from tensorllm.io import Journal
from tensorllm.lightning import PredictionJournal
from tensorllm.requests.compress import CompressRequest
from tensorllm.requests.evaluate import EvaluateRequest

pytestmark = pytest.mark.filterwarnings("ignore:::lightning", "ignore:.*treespec.*")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def request_of(folder: Path, tmp_path: Path) -> EvaluateRequest:
    return EvaluateRequest(
        model=str(folder),
        dataset="questions",
        data_file=world.save_questions(tmp_path / "questions.jsonl", 40, choices=True),
        split="all",
        out=tmp_path / "out",
        batch_tokens=150,
    )


def test_a_run_leaves_one_folder_with_all_that_names_it(request_of: EvaluateRequest):
    done = evaluate(request_of)
    assert request_of.out is not None
    assert sorted(p.name for p in request_of.out.iterdir()) == [
        "predictions.parquet",
        "results.json",
    ]
    assert not list(request_of.out.parent.glob(".*.partial"))
    results, rows = read_results(request_of.out)
    assert results == json.loads(json.dumps(done.results)) | {"seconds": results["seconds"]}
    assert rows == done.predictions
    assert {
        "metrics", "intervals", "examples", "model", "revision", "compressor", "dataset",
        "protocol", "quirks", "split", "seed", "dtype", "versions", "hardware", "command",
    } <= results.keys()  # fmt: skip
    assert results["examples"] == 40
    assert results["metrics"]["accuracy"] == pytest.approx(
        100 * sum(bool(r.correct) for r in rows) / 40
    )


def test_an_interrupted_run_goes_on(request_of: EvaluateRequest, monkeypatch: pytest.MonkeyPatch):
    want = evaluate(replace(request_of, out=None))
    appended: list[int] = []
    append = Journal.append

    def dies(self: Journal, records: Iterable[Any]) -> None:
        if len(appended) == 3:
            raise KeyboardInterrupt
        appended.extend([1])
        append(self, records)

    monkeypatch.setattr(Journal, "append", dies)
    with pytest.raises((KeyboardInterrupt, SystemExit, Incomplete)):
        evaluate(request_of)
    assert request_of.out is not None
    assert not request_of.out.exists()
    journal = next(request_of.out.parent.glob(".out.partial/journal-model/predictions-*.jsonl"))
    finished = sum(bool(line) for line in journal.read_text().splitlines())
    journal.write_text(journal.read_text() + '{"index": 7, "prom')  # cut short by the crash
    scored: list[int] = []

    def counts(self: Journal, records: Iterable[Any]) -> None:
        new = list(records)
        scored.extend(record["index"] for record in new)
        append(self, new)

    monkeypatch.setattr(Journal, "append", counts)
    done = evaluate(request_of)
    assert 0 < finished < 40
    assert len(scored) == 40 - finished
    assert [r.correct for r in done.predictions] == [r.correct for r in want.predictions]
    assert done.results["metrics"] == pytest.approx(want.results["metrics"], rel=1e-5)


def keep(folder: ResultsFolder) -> None:
    """Three predictions in the journal."""
    folder.journal("model").mkdir(exist_ok=True)
    Journal(folder.journal("model"), "predictions").append(map(asdict, random_rows(3)))


def kept(folder: ResultsFolder) -> dict[int, Prediction]:
    return PredictionJournal(folder.journal("model")).predictions()


def test_another_run_does_not_go_on_from_it(tmp_path: Path):
    keep(ResultsFolder(tmp_path / "out", "one"))
    assert len(kept(ResultsFolder(tmp_path / "out", "one"))) == 3
    assert not kept(ResultsFolder(tmp_path / "out", "two"))


def test_a_full_disk_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import pyarrow.parquet as pq

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    folder = ResultsFolder(tmp_path / "out", "one")
    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(Incomplete, match=r"No space left on device.*run the same command again"):
        folder.finish({}, {"predictions.parquet": random_rows(3)})
    assert not (tmp_path / "out").exists()


def test_existing_folders_are_safe(tmp_path: Path):
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("all my work")
    with pytest.raises(UserError, match="exists; give --overwrite"):
        ResultsFolder(other, "x")
    with pytest.raises(UserError, match=r"replaces results only"):
        ResultsFolder(other, "x", overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        ResultsFolder(other / "chapter.txt", "x")


def test_two_folders_compare(request_of: EvaluateRequest, tmp_path: Path):
    evaluate(request_of)
    assert request_of.out is not None
    before, rows = read_results(request_of.out)
    changed = [replace(r, correct=not r.correct) if r.index < 5 else r for r in rows]
    ResultsFolder(tmp_path / "b", "b").finish(before, {"predictions.parquet": changed[::-1]})
    found = compare(request_of.out, tmp_path / "b")
    right = sum(bool(r.correct) for r in rows if r.index < 5)
    assert [r["index"] for r in found["right_to_wrong"]] == [
        r.index for r in rows if r.index < 5 and r.correct
    ]
    assert (found["comparison"]["wrong_to_right"], found["comparison"]["right_to_wrong"]) == (
        5 - right,
        right,
    )
    assert found["comparison"]["loss"]["difference"] == 0
    other = {**before, "dataset": "fever"}
    ResultsFolder(tmp_path / "c", "c").finish(other, {"predictions.parquet": rows})
    with pytest.raises(UserError, match="only results of one dataset and protocol compare"):
        compare(request_of.out, tmp_path / "c")
    with pytest.raises(UserError, match="is not a folder of results"):
        compare(request_of.out, tmp_path / "nothing")


def test_bootstrap_equals_a_plain_loop():
    values = np.random.default_rng(3).normal(size=(25, 2))
    got = resampled_means(values, seed=5, resamples=40)
    generator = np.random.default_rng(5)
    drawn = generator.integers(0, 25, (40, 25))
    want = np.array([[values[list(draw), c].mean() for c in range(2)] for draw in drawn])
    np.testing.assert_allclose(got, want, rtol=1e-12)
    np.testing.assert_array_equal(got, resampled_means(values, seed=5, resamples=40))


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(60):
        verdicts = rng.random(80) < 0.3
        made = [replace(r, correct=bool(v)) for r, v in zip(random_rows(80), verdicts, strict=True)]
        low, high = intervals(made, seed=trial)["accuracy"]
        inside += low <= 30 <= high
    assert inside >= 51  # of 60; 57 expected


@pytest.mark.parametrize("verdict", [False, True])
def test_verdicts_that_are_all_the_same_are_not_sure(verdict: bool):
    """Wilson's interval of 0 of 12 (1927): 0 to z² / (12 + z²), z = 1.96."""
    made = [replace(row, correct=verdict) for row in random_rows(12)]
    z2 = 1.959964**2
    end = 100 * z2 / (12 + z2)
    wanted = [100 - end, 100] if verdict else [0, end]
    assert intervals(made, seed=0)["accuracy"] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(("up", "down"), [(0, 0), (1, 0), (5, 2), (7, 7), (40, 61), (700, 650)])
def test_mcnemar_is_the_exact_binomial_test(up: int, down: int):
    n = up + down
    ways = sum(math.comb(n, k) for k in range(min(up, down) + 1))  # whole numbers: exact
    want = min(Fraction(1), Fraction(2 * ways, 2**n))
    assert mcnemar(up, down) == pytest.approx(float(want), rel=1e-9)


def test_paired_comparison_sees_what_intervals_of_each_do_not():
    before = random_rows(60)
    after = [replace(r, log_probability=r.log_probability + 0.05 * r.answer_tokens) for r in before]
    found = compared(before, after, seed=0)
    assert found["loss"]["difference"] == pytest.approx(-0.05)
    assert found["loss"]["interval"] == pytest.approx([-0.05, -0.05])
    assert found["loss_p"] < 0.01
    assert found["mcnemar_p"] == 1.0


@pytest.mark.parametrize("examples", [5, 200])
def test_a_change_of_no_verdict_is_not_sure(examples: int):
    """Agresti and Min (2005): Wald's interval of matched pairs with 1/2 more in each cell."""
    same = random_rows(examples)
    n, b, c = examples + 2, 0.5, 0.5
    end = 100 * 1.959964 * math.sqrt((b + c) - (b - c) ** 2 / n) / n
    found = compared(same, same, seed=0)["accuracy"]
    assert found["difference"] == 0
    assert found["interval"] == pytest.approx([-end, end], rel=1e-6)


def test_processes_that_begin_together_have_one_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    keep(ResultsFolder(tmp_path / "out", "old"))
    remove, together = shutil.rmtree, threading.Barrier(2)
    delays = iter((0.1, 0.4))  # so that both find the old run there, unless they take turns

    def slow(path: Path, **options: object) -> None:
        time.sleep(next(delays))
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", slow)

    def begin() -> None:
        together.wait()
        keep(ResultsFolder(tmp_path / "out", "new"))

    with ThreadPoolExecutor(2) as pool:
        for started in [pool.submit(begin) for _ in range(2)]:
            started.result()
    journal = ResultsFolder(tmp_path / "out", "new").journal("model")
    lines = [line for path in journal.iterdir() for line in path.read_text().split("\n")]
    assert len([line for line in lines if line]) == 6  # of both, and nothing of the old run


def test_what_appeared_meanwhile_is_not_replaced(tmp_path: Path):
    folder = ResultsFolder(tmp_path / "out", "mine")
    keep(folder)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("all my work")
    with pytest.raises(UserError, match="exists; give --overwrite"):
        folder.finish({}, {"predictions.parquet": random_rows(3)})
    assert (tmp_path / "out" / "thesis.txt").exists()
    assert ResultsFolder(tmp_path / "other", "mine")  # and the rows are still there
    assert len(kept(folder)) == 3


def test_folders_of_other_sizes_compare_what_both_have(tmp_path: Path):
    rows = [replace(row, index=i) for i, row in enumerate(random_rows(20))]
    results = {"dataset": "fever", "protocol": "strict"}
    for name, some in (("a", rows), ("b", rows[:8])):
        ResultsFolder(tmp_path / name, name).finish(
            results | {"metrics": metrics_of(some)}, {"predictions.parquet": some}
        )
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found["metrics"]["before"] == found["metrics"]["after"] == metrics_of(rows[:8])
    assert found["comparison"]["accuracy"]["difference"] == 0


def test_numbers_that_overflow_end_the_run(
    request_of: EvaluateRequest, monkeypatch: pytest.MonkeyPatch
):
    load = Loader.__call__

    def overflowing(self: Loader) -> Any:
        model = load(self)
        model.transformer.ln_f.weight.data[:] = float("inf")
        return model

    monkeypatch.setattr(Loader, "__call__", overflowing)
    with pytest.raises(UserError, match=r"loss is nan on example .* activations overflow"):
        evaluate(request_of)


def test_one_model_is_in_memory_at_a_time(
    request_of: EvaluateRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    small = tmp_path / "small"
    asked = {"mode": "shared-tucker", "settings": {"ranks": (8, 4, 2)}, "out": small}
    run(CompressRequest(model=request_of.model, **asked))
    load, loaded, alive = Loader.__call__, [], []

    def counted(self: Loader) -> Any:
        alive.append(sum(model() is not None for model in loaded))
        made = load(self)
        loaded.append(weakref.ref(made))
        return made

    monkeypatch.setattr(Loader, "__call__", counted)
    evaluate(replace(request_of, compressed=small))
    assert alive == [0, 0]
