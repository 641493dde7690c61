"""The end of a search: score the winner on the test part and write the results."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from tensorllm.environment import environment
from tensorllm.io import replacing, write_json, write_text
from tensorllm.progress import Progress, quiet
from tensorllm.recipes import as_yaml
from tensorllm.reporting.search_plots import save_plots
from tensorllm.search.composition import Step, composed, selection, whole
from tensorllm.search.final import final_scores, mean_scores
from tensorllm.search.objectives import Objective
from tensorllm.search.queue import REASON, RESULT, TrialQueue, infeasible
from tensorllm.search.selection import by_dataset, front, half_width, ranked
from tensorllm.search.space import Point, Space
from tensorllm.search.study import Study
from tensorllm.search.trial import TrialResult
from tensorllm.search.verdict import LEVEL, overall, verdict
from tensorllm.shown import MAIN

FIGURES = tuple(name for name in TrialResult.__dataclass_fields__ if name != "parts")
RECIPE, TRIALS, RESULTS = "best.yaml", "trials.parquet", "results.json"


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The outcome of a search.

    Attributes:
        results: the content of `results.json`.
        recipe: the winner as YAML, for `tensorllm compress --config`.
        keeps: whether to write a recipe: the winner was found better, a compression ratio or
            several objectives were asked for, or `force_best` is set.
        logged_to: the folder that a logger wrote to.
    """

    results: dict[str, Any]
    recipe: str
    keeps: bool
    logged_to: Path | None = None

    def to_json(self) -> dict[str, Any]:
        return {**self.results, "recipe": self.recipe}


def conclude(
    run: Study, queue: TrialQueue, steps: Sequence[Step], progress: Progress = quiet
) -> SearchResult:
    """Score the original and the point chosen on validation on the test part.

    Args:
        run, queue: of the first step.
        steps: each one on top of those before it.
        progress: called with (test examples scored, examples in all, which model).
    """
    first, point, goal = steps[0], composed(steps), run.goal_of(queue)
    final = final_scores(run, queue, point, progress)
    optimism = selection(steps, run.request.seed) if goal.metric == "accuracy" else None
    winner = whole(steps, final["ratio"])
    datasets = _by_dataset(run, first.original, winner, final, optimism)
    results: dict[str, Any] = {
        **_asked(run, goal),
        **_tried(run, steps, [each["validation_examples"] for each in datasets]),
        "original": {
            "validation": _plain(first.original),
            "test": mean_scores([each["original"]["test"] for each in datasets]),
        },
        "winner": {
            "trial": first.number if len(steps) == 1 else None,
            **point.recipe(),
            "validation": _plain(winner),
            "test": mean_scores([each["winner"]["test"] for each in datasets]),
        },
        "steps": [_described(step) for step in steps],
        "test_looks": final["looks"],
        "selection": optimism,
        **_judged(datasets, goal),
        "datasets": datasets,
        "guide": first.guide,
        "late": run.late and queue.waiting() > 0,
        **_best(first, goal, goal if goal.several else run.goal_of(queue, "pareto"), run.space),
        "cache": _cache(run),
        "environment": environment(),
    }
    sized = goal.several or (run.request.min_ratio or 0) > 1
    better = results["verdict"]["found"] == "better"
    keeps = better or sized or run.request.force_best
    return SearchResult(results, recipe_text(run, point, results), keeps)


def _asked(run: Study, goal: Objective) -> dict[str, Any]:
    """What was searched, and how."""
    return {
        "model": run.source.name,
        "dataset": run.dataset,
        "protocol": run.protocol.name,
        "dtype": str(run.loader.dtype).removeprefix("torch."),
        "objective": run.request.objective,
        "metric": goal.metric,
        "several_objectives": goal.several,
        "sampler": run.sampler.name,
        "space": run.space.describe(),
    }


def _tried(run: Study, steps: Sequence[Step], examples: Sequence[int]) -> dict[str, Any]:
    """How many trials were made, on how many questions.

    Args:
        examples: validation examples of each dataset; the smallest gives the widest interval.
    """
    return {
        "trials": _counts([trial for step in steps for trial in step.trials]),
        "too_large": {"points": run.too_large, "min_ratio": run.request.least_ratio},
        "stop_level": run.request.level,
        "validation_examples": sum(examples),
        "half_width": half_width(min(examples)),
    }


def _judged(datasets: Sequence[Mapping[str, Any]], goal: Objective) -> dict[str, Any]:
    """The verdict over all datasets; for a single dataset also the figures behind it."""
    comparisons = [each["comparison"] for each in datasets]
    alone = len(datasets) == 1
    return {
        "comparison": comparisons[0] if alone else None,
        "guards": datasets[0]["guards"] if alone else None,
        "verdict": overall(
            [each["name"] for each in datasets],
            comparisons,
            [each["verdict"] for each in datasets],
            goal,
        ),
    }


def _best(step: Step, goal: Objective, trade: Objective, space: Space) -> dict[str, Any]:
    """The ten best distinct points of a step, and its Pareto front.

    Args:
        trade: the objectives that are traded against each other.
    """
    order: dict[str, dict[str, Any]] = {}
    for trial, found in ranked(step.trials, goal):  # samplers may draw the same point twice
        order.setdefault(space.point(trial.params).key, _row(trial, found, goal))
    return {
        "top": list(order.values())[:10],
        "front": [_row(*each, goal) for each in front(step.trials, trade)],
    }


def _described(step: Step) -> dict[str, Any]:
    """One step of a stack of edits: its trial, settings and scores."""
    return {
        "trial": step.number,
        **step.point.recipe(),
        "validation": _plain(step.result),
        **({"guide": step.guide} if step.guide else {}),
    }


def _by_dataset(
    run: Study,
    original: TrialResult,
    winner: TrialResult,
    final: Mapping[str, Any],
    optimism: Mapping[str, Any] | None,
) -> list[dict[str, Any]]:
    """The findings on each dataset, under the same names as for a single dataset."""
    every = zip(
        run.datasets, by_dataset(original), by_dataset(winner), final["datasets"], strict=True
    )
    out = []
    for at, (questions, before, after, tested) in enumerate(every):
        own = optimism if optimism is None else optimism.get("datasets", [optimism])[at]
        share = LEVEL / len(run.datasets)
        examples = len(questions.validation.examples)
        out.append(
            {
                "name": questions.label,
                "validation_examples": examples,
                "half_width": half_width(examples),
                "original": {"validation": _plain(before), "test": tested["original"]},
                "winner": {"validation": _plain(after), "test": tested["winner"]},
                "selection": own,
                "comparison": tested["comparison"],
                "guards": tested["guards"],
                "verdict": verdict(tested["comparison"], own, tested["guards"], run.goal, share),
            }
        )
    return out


def recipe_text(run: Study, point: Point, results: dict[str, Any]) -> str:
    """The winner as YAML for `tensorllm compress --config`."""
    recipe = {
        "model": run.request.model,
        "dataset": run.request.dataset or run.dataset,
        **point.recipe(),
        "origin": "searched",
        "source": f"tensorllm search-ranks, best of {results['trials']['examined']} trials on "
        f"{results['validation_examples']} validation examples; "
        f"{_test_scores(results['datasets'], results['metric'])} ({results['verdict']['found']})",
    }
    return as_yaml(recipe)


def _test_scores(datasets: Sequence[Mapping[str, Any]], metric: str) -> str:
    sentences = []
    for each in datasets:
        before, after = each["original"]["test"], each["winner"]["test"]
        figure = metric if metric in after else "loss"
        of = f" of {each['name']}" if len(datasets) > 1 else ""
        change = f"{before[figure]:.4g} before, {after[figure]:.4g} after"
        sentences.append(f"{figure} on the test part{of} {change}")
    return "; ".join(sentences)


def _counts(trials: Sequence[FrozenTrial]) -> dict[str, int]:
    results = [t.user_attrs[RESULT] for t in trials if RESULT in t.user_attrs]
    return {
        "all": len(trials),
        "examined": len(results),
        "pruned": sum(r["stopped"] for r in results),
        "infeasible": sum(infeasible(t) for t in trials),
        "failed": sum(t.state == TrialState.FAIL for t in trials),
        "examples_scored": sum(r["seen"] for r in results),
    }


def _row(trial: FrozenTrial, found: TrialResult, goal: Objective) -> dict[str, Any]:
    return {
        "trial": trial.number,
        "params": trial.params,
        **_plain(found),
        **({"worst_change": goal.values(found)[0]} if found.parts else {}),
    }


def _plain(found: TrialResult) -> dict[str, Any]:
    """A result's figures without verdicts; over several datasets also those on each."""
    out = {name: getattr(found, name) for name in FIGURES if name != "correct"}
    each = [part and {name: getattr(part, name) for name in MAIN} for part in found.parts]
    return out | ({"datasets": each} if each else {})


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
    """Write `results.json`, the plots (with matplotlib), and `best.yaml` if it is kept."""
    import pyarrow.parquet as pq

    if found.keeps:
        write_text(folder / RECIPE, found.recipe)
    else:  # an earlier run may have written one for another winner
        (folder / RECIPE).unlink(missing_ok=True)
    write_json(folder / RESULTS, found.results)
    done = run.decomposed(point)
    with (folder / TRIALS).open("rb") as file:
        rows = pq.read_table(file).to_pylist()
    sites = [asdict(site.report) for site in done]
    details = {site.site.name: site.details for site in done}
    save_plots(folder, rows, found.results, sites, details)


def write_trials(folder: Path, run: Study, trials: Sequence[FrozenTrial]) -> None:
    """Write all trials of a search as a table, one trial a row."""
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
                **{name: result.get(name) for name in FIGURES},
                **_columns(run, result),
                "reason": trial.user_attrs.get(REASON),
                "started": trial.datetime_start,
                "finished": trial.datetime_complete,
            }
        )
    with replacing(folder / TRIALS) as temporary, temporary.open("wb") as file:
        pq.write_table(pa.Table.from_pylist(rows), file)


def _columns(run: Study, result: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy and loss on each dataset, if there are several."""
    if len(run.datasets) == 1:
        return {}
    parts = result.get("parts") or [None] * len(run.datasets)
    return {
        f"{name} on {questions.label}": None if part is None else part[name]
        for questions, part in zip(run.datasets, parts, strict=True)
        for name in MAIN
    }
