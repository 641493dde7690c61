"""The end of a search: the winner's scores on the test part, and what is written of it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from tensorllm.environment import environment
from tensorllm.evaluation.evaluate import evaluate_model
from tensorllm.evaluation.predictions import Prediction
from tensorllm.evaluation.statistics import compared
from tensorllm.io import replacing, write_text
from tensorllm.reporting.search_plots import save_plots
from tensorllm.search.composition import Step, composed, selection, whole
from tensorllm.search.decompositions import applied
from tensorllm.search.guide import agreement
from tensorllm.search.objectives import OBJECTIVES
from tensorllm.search.queue import REASON, RESULT, TrialQueue
from tensorllm.search.selection import front, half_width, ranked
from tensorllm.search.space import Point
from tensorllm.search.study import Study
from tensorllm.search.trial import TrialResult
from tensorllm.search.verdict import guards_of, verdict

RECIPE, TRIALS, RESULTS = "best.yaml", "trials.parquet", "results.json"


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a search found.

    Attributes:
        results: what `results.json` holds.
        recipe: the winner, for `tensorllm compress --config`.
        keeps: whether the winner is worth a recipe of its own: it was found better, a size or
            several objectives were asked for, or `force_best`.
    """

    results: dict[str, Any]
    recipe: str
    keeps: bool

    def to_json(self) -> dict[str, Any]:
        return {**self.results, "recipe": self.recipe}


def conclude(run: Study, queue: TrialQueue, steps: Sequence[Step]) -> SearchResult:
    """Score what was chosen on validation, and the original, on the test part.

    Args:
        run, queue: of the first step.
        steps: each on top of those before it.
    """
    first, point = steps[0], composed(steps)
    final = _final(run, queue, point)
    goal = run.goal
    order = ranked(first.trials, goal)
    luck = selection(steps, run.request.seed)
    results = {
        "model": run.source.name,
        "dataset": run.validation.name,
        "protocol": run.protocol.name,
        "dtype": str(run.dtype).removeprefix("torch."),
        "objective": run.request.objective,
        "several_objectives": goal.several,
        "sampler": run.sampler,
        "space": run.space.describe(),
        "trials": _counts([trial for step in steps for trial in step.trials]),
        "too_large": {"points": run.too_large, "min_ratio": run.request.least_ratio},
        "stop_level": run.request.level,
        "validation_examples": len(run.validation.examples),
        "half_width": half_width(len(run.validation.examples)),
        "original": {"validation": _plain(first.original), "test": final["original"]},
        "winner": {
            "trial": first.number if len(steps) == 1 else None,
            **point.recipe(),
            "validation": _plain(whole(steps, final["ratio"])),
            "test": final["winner"],
        },
        "steps": [
            {"trial": step.number, **step.point.recipe(), "validation": _plain(step.result)}
            for step in steps
        ],
        "test_looks": final["looks"],
        "selection": luck,
        "comparison": final["comparison"],
        "guards": final["guards"],
        "verdict": verdict(final["comparison"], luck, final["guards"], goal),
        "guide": None
        if run.guide is None
        else agreement(run.guide, first.trials, lambda t: run.space.point(t.params).key),
        "late": run.late and queue.waiting() > 0,
        "top": [_row(t, f) for t, f in order[:10]],
        "front": [
            _row(t, f)
            for t, f in front(first.trials, goal if goal.several else OBJECTIVES["pareto"])
        ],
        "cache": _cache(run),
        "environment": environment(),
    }
    sized = goal.several or (run.request.min_ratio or 0) > 1
    better = results["verdict"]["found"] == "better"
    keeps = better or sized or run.request.force_best
    return SearchResult(results, recipe_text(run, point, results), keeps)


def recipe_text(run: Study, point: Point, results: dict[str, Any]) -> str:
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
        f"{before[figure]:.4g} before, {after[figure]:.4g} after "
        f"({results['verdict']['found']})",
    }
    return yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=76)


def _final(run: Study, queue: TrialQueue, point: Point) -> dict[str, Any]:
    """Test scores of winner and original: measured once, unless another winner comes."""
    attrs = queue.study.user_attrs
    known = attrs.get("final")
    if known is not None and known["point"] == point.key and "comparison" in known:
        return dict(known)
    test = run.test
    weights = run.examiner.weights
    edit = run.final_edit(point)
    original, before_rows = _score(run, test)
    with applied(edit, run.roles, weights):
        winner, after_rows = _score(run, test)
    comparison = compared(before_rows, after_rows, run.request.seed)
    comparison["asked"] = before_rows[0].correct is not None
    looks = (known["looks"] if known else 0) + 1
    before, after = sum(s.before for s in edit.sites), sum(s.after for s in edit.sites)
    final = {
        "point": point.key,
        "original": original,
        "winner": winner,
        "looks": looks,
        "comparison": comparison,
        "guards": guards_of(before_rows, after_rows) if comparison["asked"] else None,
        "ratio": before / after,
    }
    queue.study.set_user_attr("final", final)
    return final


def _score(run: Study, data: Any) -> tuple[dict[str, Any], list[Prediction]]:
    rows: list[Prediction] = []
    metrics = evaluate_model(run.model, run.tokenizer, data, run.protocol, on_batch=rows.extend)
    return metrics, sorted(rows, key=lambda row: row.index)


def _counts(trials: Sequence[FrozenTrial]) -> dict[str, int]:
    results = [t.user_attrs[RESULT] for t in trials if RESULT in t.user_attrs]
    return {
        "all": len(trials),
        "examined": len(results),
        "pruned": sum(r["stopped"] for r in results),
        "infeasible": sum(t.state == TrialState.PRUNED and REASON in t.user_attrs for t in trials),
        "failed": sum(t.state == TrialState.FAIL for t in trials),
        "examples_scored": sum(r["seen"] for r in results),
    }


def _row(trial: FrozenTrial, found: TrialResult) -> dict[str, Any]:
    return {"trial": trial.number, "params": trial.params, **_plain(found)}


def _plain(found: TrialResult) -> dict[str, Any]:
    return {name: value for name, value in found.to_json().items() if name != "correct"}


def _cache(run: Study) -> dict[str, Any]:
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


def write_files(folder: Path, run: Study, point: Point, found: SearchResult) -> None:
    """`results.json`, where matplotlib is the plots, and `best.yaml` where that is kept."""
    import pyarrow.parquet as pq

    if found.keeps:
        write_text(folder / RECIPE, found.recipe)
    else:  # of an earlier run, which had another winner
        (folder / RECIPE).unlink(missing_ok=True)
    write_text(folder / RESULTS, json.dumps(found.results, indent=2) + "\n")
    done = run.decomposed(point)
    rows = pq.read_table(folder / TRIALS).to_pylist()
    sites = [asdict(site.report) for site in done]
    details = {site.site.name: site.details for site in done}
    save_plots(folder, rows, found.results, sites, details)


def write_trials(folder: Path, run: Study, trials: Sequence[FrozenTrial]) -> None:
    """All trials of a search as a table, one a row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for trial in trials:
        result = trial.user_attrs.get(RESULT, {})
        known = trial.params.keys() >= run.space.choices.keys()
        reached = known and run.space.settings(trial.params) is not None
        rows.append(
            {
                "number": trial.number,
                "state": trial.state.name.lower(),
                **{name: trial.params.get(name) for name in run.space.choices},
                "point": run.space.point(trial.params).key if reached else None,
                **{name: result.get(name) for name in TrialResult.__dataclass_fields__},
                "reason": trial.user_attrs.get(REASON),
                "started": trial.datetime_start,
                "finished": trial.datetime_complete,
            }
        )
    with replacing(folder / TRIALS) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary)
