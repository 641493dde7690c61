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
    if results["several_objectives"]:
        parts[1:2] = [
            "accuracy against ratio: no trial beats these in both",
            _trials(results["front"]),
        ]
    if len(results["steps"]) > 1:
        parts.insert(2, _steps(results["steps"]))
    if results["selection"] is not None:
        parts.append(_selection(results["selection"]))
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


def _selection(gain: Mapping[str, Any]) -> str:
    low, high = gain["interval"]
    return (
        f"gain on validation {gain['gain']:+.1f} points, of which selection alone is worth "
        f"{gain['optimism']:.1f} (95 % of resamples {low:.1f} to {high:.1f})"
    )
