"""The end of a search: the winner's score on the test part, and the study's files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from tensorllm.compression.jobs import plan_jobs, run_job
from tensorllm.environment import environment
from tensorllm.errors import Incomplete
from tensorllm.evaluation.evaluate import evaluate_model
from tensorllm.pipeline.search import SearchRun
from tensorllm.search.bank import Edit, edited
from tensorllm.search.examiner import Found
from tensorllm.search.queue import REASON, RESULT, TrialQueue
from tensorllm.search.selection import front, half_width, ranked, selection_gain
from tensorllm.search.space import Point

RECIPE, TRIALS, RESULTS = "best.yaml", "trials.parquet", "results.json"


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a search found; `results` is what `results.json` holds."""

    results: dict[str, Any]
    recipe: str

    def to_json(self) -> dict[str, Any]:
        return {**self.results, "recipe": self.recipe}


def conclude(run: SearchRun, queue: TrialQueue) -> SearchResult:
    """Choose the winner on validation, and score it and the original on the test part.

    Raises:
        Incomplete: no trial was examined in full.
    """
    trials = queue.trials()
    order = ranked(trials, run.request.rules.objective)
    if not order:
        raise Incomplete(f"no trial could be examined in full: {_reasons(trials)}")
    original = run.original(queue)
    winner, found = order[0]
    point = run.space.point(winner.params)
    final = _final(run, queue, point)
    results = {
        "model": run.source.name,
        "dataset": run.validation.name,
        "protocol": run.protocol.name,
        "objective": run.request.rules.objective,
        "sampler": run.sampler,
        "space": run.space.describe(),
        "trials": _counts(trials),
        "stop_level": run.request.rules.level,
        "validation_examples": len(run.validation.examples),
        "half_width": half_width(len(run.validation.examples)),
        "original": {"validation": _plain(original), "test": final["original"]},
        "winner": {
            "trial": winner.number,
            **point.recipe(),
            "validation": _plain(found),
            "test": final["winner"],
        },
        "test_looks": final["looks"],
        "selection": selection_gain(trials, original, run.request.seed),
        "top": [_row(t, f) for t, f in order[:10]],
        "front": [_row(t, f) for t, f in front(trials)],
        "cache": _cache(run),
        "environment": environment(),
    }
    return SearchResult(results, recipe_text(run, point, results))


def write_files(result: SearchResult, run: SearchRun, queue: TrialQueue, folder: Path) -> None:
    """`best.yaml`, `trials.parquet`, `results.json` and, where matplotlib is, the plots."""
    import pyarrow.parquet as pq

    from tensorllm.reporting.search_plots import save_plots

    _write(folder / RECIPE, result.recipe.encode())
    _write(folder / RESULTS, (json.dumps(result.results, indent=2) + "\n").encode())
    write_trials(folder / TRIALS, run, queue.trials())
    rows = pq.read_table(folder / TRIALS).to_pylist()
    save_plots(folder, rows, result.results)


def write_trials(path: Path, run: SearchRun, trials: Sequence[FrozenTrial]) -> None:
    """All trials as a table, one a row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for trial in trials:
        found = trial.user_attrs.get(RESULT, {})
        known = trial.params.keys() >= run.space.choices.keys()
        rows.append(
            {
                "number": trial.number,
                "state": trial.state.name.lower(),
                **{name: trial.params.get(name) for name in run.space.choices},
                "point": run.space.point(trial.params).key if known else None,
                **{name: found.get(name) for name in Found.__dataclass_fields__},
                "reason": trial.user_attrs.get(REASON),
                "started": trial.datetime_start,
                "finished": trial.datetime_complete,
            }
        )
    temporary = path.with_suffix(".tmp")
    pq.write_table(pa.Table.from_pylist(rows), temporary)
    temporary.replace(path)


def recipe_text(run: SearchRun, point: Point, results: dict[str, Any]) -> str:
    """The winner as YAML that `tensorllm compress --config` takes."""
    import yaml

    before, after = results["original"]["test"], results["winner"]["test"]
    figure = "accuracy" if "accuracy" in after else "loss"
    recipe = {
        "model": run.request.model,
        "dataset": run.request.dataset or run.validation.name,
        **point.recipe(),
        "origin": "searched",
        "source": f"tensorllm search-ranks, best of {results['trials']['examined']} trials on "
        f"{results['validation_examples']} validation examples; {figure} on the test part "
        f"{before[figure]:.4g} before, {after[figure]:.4g} after",
    }
    return yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=100)


def _final(run: SearchRun, queue: TrialQueue, point: Point) -> dict[str, Any]:
    """Test scores of winner and original: taken once, unless another winner comes."""
    attrs = queue.study.user_attrs
    known = attrs.get("final")
    if known is not None and known["point"] == point.key:
        return dict(known)
    test = run.test
    jobs = plan_jobs(point.compressor, run.roles, point.layers)
    weights = run.examiner.weights
    done = [run_job(job, run.roles, weights) for job in jobs]  # as `compress` will do it
    edits = [Edit(d.site, d.site.unstack(d.factors.dense(), run.roles.geometry), 0.0) for d in done]
    original = known["original"] if known else _score(run, test)
    with edited(edits, run.roles, weights):
        validation = _score(run, run.validation)
        winner = _score(run, test)
    final = {
        "point": point.key,
        "original": original,
        "winner": winner,
        "winner_validation": validation,
        "looks": (known["looks"] if known else 0) + 1,
    }
    queue.study.set_user_attr("final", final)
    return final


def _score(run: SearchRun, data: Any) -> dict[str, Any]:
    return evaluate_model(run.model, run.tokenizer, data, run.protocol)


def _counts(trials: Sequence[FrozenTrial]) -> dict[str, int]:
    results = [t.user_attrs[RESULT] for t in trials if RESULT in t.user_attrs]
    return {
        "all": len(trials),
        "examined": len(results),
        "given_up": sum(r["stopped"] for r in results),
        "infeasible": sum(t.state == TrialState.PRUNED and REASON in t.user_attrs for t in trials),
        "failed": sum(t.state == TrialState.FAIL for t in trials),
        "examples_scored": sum(r["seen"] for r in results),
    }


def _row(trial: FrozenTrial, found: Found) -> dict[str, Any]:
    return {"trial": trial.number, "params": trial.params, **_plain(found)}


def _plain(found: Found) -> dict[str, Any]:
    return {name: value for name, value in found.to_json().items() if name != "correct"}


def _cache(run: SearchRun) -> dict[str, Any]:
    prefix = run.examiner.prefix
    budget, held = prefix.store.budget, prefix.store.bytes
    return {
        "budget_bytes": budget.memory,
        "bytes": held["memory"],
        "disk_budget_bytes": budget.disk,
        "disk_bytes": held["disk"],
        "layers_computed": prefix.computed,
        "layers_skipped": prefix.skipped,
    }


def _reasons(trials: Sequence[FrozenTrial]) -> str:
    reasons = [t.user_attrs[REASON] for t in trials if REASON in t.user_attrs]
    if not reasons:
        return "there is none"
    first = max(set(reasons), key=reasons.count)
    return f"{len(reasons)} trials, {reasons.count(first)} of them: {first}"


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
