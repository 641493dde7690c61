"""Evaluations that are killed, find the disk full or read large files: what is left of them."""

import json
import os
import random
import resource
import signal
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import eval_world as world
import pytest

from tensorllm.commands.evaluate import evaluate
from tensorllm.errors import Incomplete, UserError
from tensorllm.evaluation.evaluate import make_dataset
from tensorllm.evaluation.results import read_results
from tensorllm.reporting.scores import score_tables
from tensorllm.requests.evaluate import EvaluateRequest

pytestmark = pytest.mark.filterwarnings("ignore:::lightning", "ignore:.*treespec.*")
EXAMPLES = 60
FILLED = 77  # exit code of a child whose disk was full


@pytest.fixture
def asked(tmp_path: Path) -> EvaluateRequest:
    """An evaluation of many small batches."""
    return EvaluateRequest(
        model=str(world.save_model(tmp_path / "model")),
        dataset="questions",
        data_file=world.save_questions(tmp_path / "questions.jsonl", EXAMPLES),
        split="all",
        out=tmp_path / "out",
        batch_tokens=60,
    )


def in_child(work: Callable[[], object]) -> int:
    """Run in a process of its own; its id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except Incomplete:
            os._exit(FILLED)
        finally:
            os._exit(1)
    return child


def journal_bytes(out: Path) -> int:
    return sum(
        p.stat().st_size for p in out.parent.glob(".out.partial/journal-*/predictions-*.jsonl")
    )


def test_killed_at_random_moments_it_goes_on(asked: EvaluateRequest):
    want = evaluate(replace(asked, out=None))
    assert asked.out is not None
    rng = random.Random(0)
    for _ in range(3):
        before = journal_bytes(asked.out)
        more = before + rng.randint(1, 3000)
        child = in_child(lambda: evaluate(asked))
        while journal_bytes(asked.out) < more and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.0005)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert not asked.out.exists()
        assert journal_bytes(asked.out) > before
    done = evaluate(asked)
    assert [row.correct for row in done.predictions] == [row.correct for row in want.predictions]
    assert [row.loss for row in done.predictions] == pytest.approx(
        [row.loss for row in want.predictions]
    )
    assert read_results(asked.out)[1] == done.predictions


def test_a_full_disk_ends_with_one_line_and_the_next_run_goes_on(asked: EvaluateRequest):
    assert asked.out is not None

    def on_a_small_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        evaluate(asked)

    _, status = os.waitpid(in_child(on_a_small_disk), 0)
    assert os.waitstatus_to_exitcode(status) == FILLED
    assert not asked.out.exists()
    assert 0 < journal_bytes(asked.out) <= 4000
    done = evaluate(asked)
    assert done.results["examples"] == EXAMPLES
    assert sorted(row.index for row in done.predictions) == list(range(EXAMPLES))


def test_prompts_beyond_the_context_are_counted_and_told(asked: EvaluateRequest):
    assert asked.data_file is not None
    long = {"prompt": "the cat sings in Paris " * 60, "answer": "north"}
    asked.data_file.write_text(json.dumps(long) + "\n" + asked.data_file.read_text())
    done = evaluate(replace(asked, batch_tokens=None))
    assert done.results["truncated_prompts"] == 1
    assert done.predictions[0].truncated > 100
    texts = [getattr(part, "plain", "") for part in score_tables(done.results).renderables]
    assert "1 prompts lost their beginning to fit the context" in texts


def test_options_that_the_trainer_cannot_run_with_are_told(asked: EvaluateRequest):
    with pytest.raises(UserError, match=r"the Trainer cannot run so: [^\n]*limit_test_batches"):
        evaluate(replace(asked, trainer={"limit_test_batches": 0.001}))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_large_files_are_streamed(suffix: str, tmp_path: Path):
    """Each row carries 100 kB that no example needs: they are not in memory together."""
    rows = [{"input": f"q{i}", "target": "a", "context": "x" * 100_000} for i in range(200)]
    file = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == ".csv":
        lines = [",".join(row.values()) for row in rows]
        file.write_text("\n".join(["input,target,context", *lines]))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pylist(rows)
        pq.write_table(table, file, use_dictionary=False, compression="none", row_group_size=20)
    assert file.stat().st_size > 20_000_000 or suffix == ".parquet"
    del rows
    tracemalloc.start()
    examples = make_dataset("wikidata_qa", data_file=file, split="test").examples
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(examples) == 160
    assert peak < 5_000_000
