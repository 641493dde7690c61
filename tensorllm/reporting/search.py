"""The terminal view of `tensorllm search-ranks`."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType

from tensorllm.metrics import MAIN, SHOWN
from tensorllm.reporting.tables import new_table

SCORES = ("accuracy, %", "loss")


def search_tables(results: Mapping[str, Any]) -> RenderableType:
    """The top trials, validation and test of winner and original, and how sure the gain is."""
    parts: list[RenderableType] = [_sentence(results), _trials(results["top"]), _scores(results)]
    if results.get("several_objectives"):
        parts[1:2] = [
            "accuracy against ratio: no trial beats these in both",
            _trials(results["front"]),
        ]
    if len(results["steps"]) > 1:
        parts.insert(2, _steps(results["steps"]))
    if results["selection"] is not None:
        parts.append(_selection(results["selection"]))
    if results.get("guide"):
        parts.append(_guide(results["guide"]))
    if results.get("guards"):
        parts.append(_guards(results["guards"]))
    if results.get("verdict"):
        parts.append(f"verdict: {results['verdict']['sentence']}")
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
        other.append("ended by --time-limit (the same command goes on)")
    return (
        f"{n['examined']} trials of {results['model']} on {results['validation_examples']} "
        f"validation examples of {results['dataset']}, protocol {results['protocol']}"
        f"{pruned}{error}{''.join(f', {text}' for text in other)}"
    )


def _trials(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    names = list(rows[0]["params"]) if rows else []
    table = new_table("trial", *names, *SCORES, "CR", "error", number_from=0)
    table.collapse_padding = True  # a hybrid's settings and scores in 80 columns
    for row in rows:
        table.add_row(
            str(row["trial"]),
            *(_plain(row["params"][name]) for name in names),
            *_found(row),
            f"{row['ratio']:.2f}",
            f"{row['relative_error']:.4f}",
        )
    return table


def _steps(steps: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Edits in the order in which they were put on top of one another."""
    table = new_table("edit", "layers", "settings", *SCORES, number_from=3)
    shown = ("trial", "mode", "layers", "validation")
    for number, step in enumerate(steps, 1):
        settings = "; ".join(f"{key} {_plain(v)}" for key, v in step.items() if key not in shown)
        table.add_row(
            str(number),
            _plain(step["layers"]),
            f"{step['mode']}: {settings}",
            *_found(step["validation"]),
        )
    return table


def _found(scores: Mapping[str, Any]) -> tuple[str, ...]:
    values = ((SHOWN[name], scores[name]) for name in MAIN)
    return tuple("" if value is None else shown.exact(value) for shown, value in values)


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _scores(results: Mapping[str, Any]) -> RenderableType:
    table = new_table("", "validation", "test", number_from=1)
    for metric in MAIN:
        shown = SHOWN[metric]
        for who in ("original", "winner"):
            found = results[who]
            if found["test"].get(metric) is not None:
                values = (shown.exact(found[part][metric]) for part in ("validation", "test"))
                table.add_row(f"{who}: {shown.title}", *values)
    return table


def _guide(guide: Mapping[str, Any]) -> str:
    """How well the gradient has ranked the trials."""
    known = [
        f"{guide[f'spearman_{name}']:+.2f} with {name}"
        for name in ("loss", "accuracy")
        if guide[f"spearman_{name}"] is not None
    ]
    text = f"guide: {guide['points']} points ranked by the gradient of {guide['examples']} examples"
    return f"{text}; Spearman among the trials {', '.join(known) or 'not known'}"


def _guards(guards: Mapping[str, Any]) -> RenderableType:
    """What accuracy alone hides: recall by label, and how often each label is predicted."""
    labels = list(guards["original"]["shares"])
    table = new_table("on test", "balanced, %", *(f"says {x}, %" for x in labels), number_from=1)
    for who in ("original", "winner"):
        shares = (f"{100 * guards[who]['shares'][label]:.1f}" for label in labels)
        table.add_row(who, f"{guards[who]['balanced_accuracy']:.1f}", *shares)
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
    return (
        f"gain on validation {gain['gain']:+.1f} points, of which selection alone is worth "
        f"{gain['optimism']:.1f} (95 % of resamples {low:.1f} to {high:.1f})"
    )
