"""Score winner and original on the test parts: once, unless the winner changes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tensorllm.data.base import ReasoningDataModule
from tensorllm.evaluation.evaluate import evaluate_model
from tensorllm.evaluation.predictions import Prediction
from tensorllm.evaluation.statistics import compared
from tensorllm.progress import Progress, quiet
from tensorllm.search.decompositions import applied
from tensorllm.search.queue import TrialQueue
from tensorllm.search.space import Point
from tensorllm.search.study import Study
from tensorllm.search.verdict import guards_of
from tensorllm.shown import MAIN

Scored = tuple[dict[str, Any], list[Prediction]]


def final_scores(
    run: Study, queue: TrialQueue, point: Point, progress: Progress = quiet
) -> dict[str, Any]:
    """The scores on the test parts, stored with the study.

    Args:
        progress: called with (examples scored, examples in all, which model).

    Returns:
        `point`; its `ratio`; `looks`: how often the test parts were used; `datasets`: for each
        the scores of `original` and `winner`, their `comparison`, and `guards`.
    """
    known = queue.study.user_attrs.get("final")
    if known is not None and known["point"] == point.key and "datasets" in known:
        return dict(known)
    edit = run.final_edit(point)
    tests = [questions.test for questions in run.datasets]
    total, done = 2 * sum(len(test.examples) for test in tests), 0

    def scored(what: str) -> list[Scored]:
        return [_score(run, test, lambda batch: advance(len(batch), what)) for test in tests]

    def advance(count: int, what: str) -> None:
        nonlocal done
        done += count
        progress(done, total, what)

    before = scored("original on test")
    with applied(edit, run.roles, run.examiner.weights):
        after = scored("winner on test")
    full, stored = sum(s.before for s in edit.sites), sum(s.after for s in edit.sites)
    final = {
        "point": point.key,
        "ratio": full / stored,
        "looks": (known["looks"] if known else 0) + 1,
        "datasets": [
            {
                "original": original,
                "winner": winner,
                "comparison": (comparison := _compared(b, a, run.request.seed)),
                "guards": guards_of(b, a) if comparison["asked"] else None,
            }
            for (original, b), (winner, a) in zip(before, after, strict=True)
        ],
    }
    queue.study.set_user_attr("final", final)
    return final


def _score(
    run: Study, data: ReasoningDataModule, on_batch: Callable[[list[Prediction]], None]
) -> Scored:
    rows: list[Prediction] = []

    def keep(batch: list[Prediction]) -> None:
        rows.extend(batch)
        on_batch(batch)

    metrics = evaluate_model(run.model, run.tokenizer, data, run.protocol, on_batch=keep)
    return metrics, sorted(rows, key=lambda row: row.index)


def _compared(
    before: Sequence[Prediction], after: Sequence[Prediction], seed: int
) -> dict[str, Any]:
    return {**compared(before, after, seed), "asked": before[0].correct is not None}


def mean_scores(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One dataset's scores unchanged; of several, the mean over those that have the metric."""
    if len(scores) == 1:
        return dict(scores[0])
    known = {name: [s[name] for s in scores if s.get(name) is not None] for name in MAIN}
    return {
        **{name: sum(values) / len(values) for name, values in known.items() if values},
        "examples": sum(s["examples"] for s in scores),
        "dataset": ", ".join(s["dataset"] for s in scores),
        "split": scores[0]["split"],
        "protocol": scores[0]["protocol"],
    }
