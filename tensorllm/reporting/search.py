"""The terminal view of `tensorllm search-ranks`."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType

from tensorllm.reporting.rows import new_table
from tensorllm.shown import MAIN, SHOWN

SCORES = {"accuracy": "accuracy, %", "loss": "loss"}
ACROSS = 4  # with more labels, each has a row instead of a column


def search_tables(results: Mapping[str, Any]) -> RenderableType:
    """The top trials, validation and test of winner and original, and how certain the gain is."""
    datasets = results.get("datasets") or [results]
    names = [each["name"] for each in datasets] if len(datasets) > 1 else []
    top = results["front" if results.get("several_objectives") else "top"]
    metric = results["metric"]
    parts: list[RenderableType] = [_sentence(results), _trials(top, names, metric)]
    if results.get("several_objectives"):
        parts.insert(1, "accuracy against ratio: no trial beats these in both")
    if len(results["steps"]) > 1:
        parts.append(_steps(results["steps"], names, metric))
    parts += [_scores(each, each["name"] if names else "") for each in datasets]
    if results["selection"] is not None:
        parts.append(_selection(results["selection"]))
    guides = [step["guide"] for step in results["steps"] if step.get("guide")]
    parts += [_guide(guide, n if len(guides) > 1 else 0) for n, guide in enumerate(guides, 1)]
    for each in datasets:
        if each.get("guards"):
            parts.append(_guards(each["guards"], f"test of {each['name']}" if names else "on test"))
    if results.get("verdict"):
        parts.append(f"verdict: {results['verdict']['sentence']}")
        parts += [f"  {each['name']}: {each['verdict']['sentence']}" for each in datasets if names]
    ratio = results["winner"]["validation"]["ratio"]
    if ratio < 1:
        parts.append(
            f"the winner's factors hold more numbers than its matrices (ratio {ratio:.2f}): it is "
            "no smaller; --min-ratio 1 searches only what is"
        )
    return Group(*parts)


def _sentence(results: Mapping[str, Any]) -> str:
    n = results["trials"]
    level = results["stop_level"]
    pruned = f", {n['pruned']} pruned early" if n["pruned"] else ""
    error = f" (the best one with probability at most {level:g})" if n["pruned"] else ""
    other = [f"{n[name]} {name}" for name in ("infeasible", "failed") if n[name]]
    too_large = results.get("too_large", {"points": 0})
    if too_large["points"]:
        least = too_large["min_ratio"]
        other.append(
            f"{too_large['points']} points left out, which hold more numbers than the matrices "
            "(--min-ratio 0 tries them)"
            if least == 1
            else f"{too_large['points']} points left out with a ratio below {least:g}"
        )
    if results.get("late"):
        other.append("ended by --time-limit (with --study the same command goes on)")
    return (
        f"{n['examined']} trials of {results['model']} on {results['validation_examples']} "
        f"validation examples of {results['dataset']}, protocol {results['protocol']}"
        f"{pruned}{error}{''.join(f', {text}' for text in other)}"
    )


def _trials(
    rows: Sequence[Mapping[str, Any]], datasets: Sequence[str], metric: str
) -> RenderableType:
    names = list(rows[0]["params"]) if rows else []
    worst = ["worst change"] if datasets else []
    known = _known(rows)
    columns = datasets or [SCORES[name] for name in known]
    table = new_table("trial", *names, *worst, *columns, "CR", "error", number_from=0)
    table.collapse_padding = True  # fits a hybrid's settings and scores into 80 columns
    for row in rows:
        table.add_row(
            str(row["trial"]),
            *(_plain(row["params"][name]) for name in names),
            *(f"{row['worst_change']:+.4g}" for _ in worst),
            *_found(row, known, metric),
            f"{row['ratio']:.2f}",
            f"{row['relative_error']:.4f}",
        )
    return table


def _steps(
    steps: Sequence[Mapping[str, Any]], datasets: Sequence[str], metric: str
) -> RenderableType:
    """The edits in the order in which they were stacked."""
    known = _known([step["validation"] for step in steps])
    columns = datasets or [SCORES[name] for name in known]
    table = new_table("edit", "layers", "settings", *columns, number_from=3)
    shown = ("trial", "mode", "layers", "validation", "guide")
    for number, step in enumerate(steps, 1):
        settings = "; ".join(f"{key} {_plain(v)}" for key, v in step.items() if key not in shown)
        table.add_row(
            str(number),
            _plain(step["layers"]),
            f"{step['mode']}: {settings}",
            *_found(step["validation"], known, metric),
        )
    return table


def _known(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics that are known: running text has no accuracy."""
    return [name for name in MAIN if any(row[name] is not None for row in rows)]


def _found(scores: Mapping[str, Any], known: Sequence[str], metric: str) -> tuple[str, ...]:
    """The known scores; over several datasets the metric on each, or the loss instead."""
    values = [(SHOWN[name], scores[name]) for name in known]
    if "datasets" in scores:
        names = [metric if each[metric] is not None else "loss" for each in scores["datasets"]]
        each = zip(names, scores["datasets"], strict=True)
        values = [(SHOWN[name], found[name]) for name, found in each]
    return tuple("" if value is None else shown.exact(value) for shown, value in values)


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _scores(results: Mapping[str, Any], title: str) -> RenderableType:
    table = new_table(title, "validation", "test", number_from=1)
    for metric in MAIN:
        shown = SHOWN[metric]
        for who in ("original", "winner"):
            found = results[who]
            if found["test"].get(metric) is not None:
                values = (shown.exact(found[part][metric]) for part in ("validation", "test"))
                table.add_row(f"{who}: {shown.title}", *values)
    return table


def _guide(guide: Mapping[str, Any], edit: int) -> str:
    """How well the guide ranked the trials; names the edit if there are several."""
    known = [
        f"{guide[f'spearman_{name}']:+z.2f} with {name}"
        for name in ("loss", "accuracy")
        if guide[f"spearman_{name}"] is not None
    ]
    return (
        f"guide{f' of edit {edit}' if edit else ''}: {guide['points']} points ranked by the "
        f"gradient of {guide['examples']} examples; Spearman among the trials examined in full "
        f"{', '.join(known) or 'not known'}"
    )


def _guards(guards: Mapping[str, Any], title: str) -> RenderableType:
    """What accuracy alone hides: recall by label, and how often each label is predicted."""
    labels = list(guards["original"]["shares"])
    heads = ["balanced, %", *(f"says {label}, %" for label in labels)]
    rows = {
        who: [
            f"{guards[who]['balanced_accuracy']:.1f}",
            *(f"{100 * guards[who]['shares'][label]:.1f}" for label in labels),
        ]
        for who in ("original", "winner")
    }
    if len(labels) <= ACROSS:
        table = new_table(title, *heads, number_from=1)
        for who, shown in rows.items():
            table.add_row(who, *shown)
    else:
        table = new_table(title, *rows, number_from=1)
        for head, *shown in zip(heads, *rows.values(), strict=True):
            table.add_row(head, *shown)
    plain = guards.get("without_prior")
    table.caption = f"always the commonest answer: {guards['majority']:.1f} %"
    if plain is not None:
        table.caption += (
            f"; each model's prior for the labels taken out: {plain['original']:.1f} % → "
            f"{plain['winner']:.1f} %"
        )
    return table


def _selection(gain: Mapping[str, Any]) -> str:
    low, high = gain["interval"]
    what = "worst gain" if "datasets" in gain else "gain"
    return (
        f"{what} on validation {gain['gain']:+z.1f} points, of which selection alone is worth "
        f"{gain['optimism']:z.1f} (95 % of resamples {low:z.1f} to {high:z.1f})"
    )
