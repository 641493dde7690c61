"""The end of a search: the winner's score on the test part."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from tensorllm.commands.search_compose import Step, composed, selection, whole
from tensorllm.commands.search_run import SearchRun
from tensorllm.compression.jobs import decomposed
from tensorllm.compression.plan import plan_jobs
from tensorllm.environment import environment
from tensorllm.evaluation.evaluate import evaluate_model
from tensorllm.search.bank import Edit, edited
from tensorllm.search.feasible import ratio_of
from tensorllm.search.found import Found
from tensorllm.search.queue import REASON, RESULT, TrialQueue
from tensorllm.search.selection import front, half_width, ranked
from tensorllm.search.space import Point


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a search found; `results` is what `results.json` holds."""

    results: dict[str, Any]
    recipe: str

    def to_json(self) -> dict[str, Any]:
        return {**self.results, "recipe": self.recipe}


def conclude(run: SearchRun, queue: TrialQueue, steps: Sequence[Step]) -> SearchResult:
    """Score what was chosen on validation, and the original, on the test part.

    Args:
        run, queue: of the first step.
        steps: each on top of those before it.
    """
    first, point = steps[0], composed(steps)
    ratio = ratio_of(plan_jobs(point.compressor, run.roles, point.layers), run.roles)
    final = _final(run, queue, point)
    order = ranked(first.trials, run.request.rules.objective)
    results = {
        "model": run.source.name,
        "dataset": run.validation.name,
        "protocol": run.protocol.name,
        "objective": run.request.rules.objective,
        "sampler": run.sampler,
        "space": run.space.describe(),
        "trials": _counts([trial for step in steps for trial in step.trials]),
        "stop_level": run.request.rules.level,
        "validation_examples": len(run.validation.examples),
        "half_width": half_width(len(run.validation.examples)),
        "original": {"validation": _plain(first.original), "test": final["original"]},
        "winner": {
            "trial": first.number if len(steps) == 1 else None,
            **point.recipe(),
            "validation": _plain(whole(steps, ratio)),
            "test": final["winner"],
        },
        "steps": [
            {"trial": step.number, **step.point.recipe(), "validation": _plain(step.found)}
            for step in steps
        ],
        "test_looks": final["looks"],
        "selection": selection(steps, run.request.seed),
        "top": [_row(t, f) for t, f in order[:10]],
        "front": [_row(t, f) for t, f in front(first.trials)],
        "cache": _cache(run),
        "environment": environment(),
    }
    return SearchResult(results, recipe_text(run, point, results))


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
    return yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=76)


def _final(run: SearchRun, queue: TrialQueue, point: Point) -> dict[str, Any]:
    """Test scores of winner and original: taken once, unless another winner comes."""
    attrs = queue.study.user_attrs
    known = attrs.get("final")
    if known is not None and known["point"] == point.key:
        return dict(known)
    test = run.test
    weights = run.examiner.weights
    done = decomposed(point.compressor, run.roles, weights, point.layers)  # as `compress` does
    edits = [Edit(d.site, d.site.unstack(d.factors.dense(), run.roles.geometry), 0.0) for d in done]
    original = known["original"] if known else _score(run, test)
    with edited(edits, run.roles, weights):
        winner = _score(run, test)
    looks = (known["looks"] if known else 0) + 1
    final = {"point": point.key, "original": original, "winner": winner, "looks": looks}
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
