"""The page's section on a search, as plain values for its template."""

from collections.abc import Mapping
from typing import Any

from tensorllm.compression.descriptions import numbers
from tensorllm.reporting.page.figures import between, score_tile, short_name, smaller, times
from tensorllm.reporting.page.plots_search import search_pictures
from tensorllm.reporting.page.runs import Searched
from tensorllm.reporting.page.sections import provenance_rows
from tensorllm.reporting.page.theme import Canvas
from tensorllm.shown import MAIN, SHOWN

TOP = 8  # trials


def search_view(run: Searched, canvas: Canvas, number: int) -> dict[str, Any]:
    """Everything the template shows of one study."""
    found = run.results
    winner, original = found["winner"], found["original"]
    metric = "accuracy" if winner["test"].get("accuracy") is not None else "loss"
    before, after = original["test"][metric], winner["test"][metric]
    datasets = found.get("datasets") or [found]  # older studies have only one
    several = len(datasets) > 1
    where = f"mean of {len(datasets)} test parts" if several else "on the test part"
    counts = found["trials"]
    factor, what = smaller(winner["validation"]["ratio"])
    settings = {k: v for k, v in winner.items() if k not in ("trial", "validation", "test", "mode")}
    return {
        "id": f"run-{number}",
        "kind": "Search",
        "title": f"{short_name(found['model'])}, search of {winner['mode']}",
        "sentence": (
            f"Best of {counts['examined']} trials on {found['validation_examples']:,} validation "
            f"examples of {found['dataset']}: {_settings(settings)}. "
            + " ".join(_on_test(each, several) for each in datasets)
        ),
        "tiles": [
            score_tile(metric, where, after, before),
            score_tile(
                metric,
                "mean on validation" if several else "on validation",
                winner["validation"][metric],
                original["validation"][metric],
            )
            | {"tone": ""},
            {
                "label": "compressed matrices",
                "value": times(factor),
                "note": what,
                "tone": "",
            },
            {
                "label": "trials",
                "value": f"{counts['examined']:,}",
                "note": f"{counts['pruned']} pruned early",
                "tone": "",
            },
        ],
        "pictures": search_pictures(canvas, run.trials, found, f"{number}-"),
        "gain": _gain(found.get("selection")),
        "top": [_trial(row) for row in found["top"][:TOP]],
        "provenance": _provenance(found),
    }


def _on_test(found: Mapping[str, Any], several: bool) -> str:
    """The change on a dataset's test part, in one sentence."""
    before, after = found["original"]["test"], found["winner"]["test"]
    metric = "accuracy" if after.get("accuracy") is not None else "loss"
    shown = SHOWN[metric]
    return (
        f"On the test part{' of ' + found['name'] if several else ''}, {metric} is "
        f"{shown.brief(after[metric])} {shown.unit} instead of {shown.brief(before[metric])}."
    )


def _trial(row: Mapping[str, Any]) -> dict[str, str]:
    scores = {m: "" if row[m] is None else SHOWN[m].exact(row[m]) for m in MAIN}
    return {
        "number": str(row["trial"]),
        "settings": _settings(row["params"]),
        **scores,
        "ratio": times(row["ratio"]),
        "error": f"{row['relative_error']:.4f}",
    }


def _settings(values: Mapping[str, Any]) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, list | tuple):
            return ", ".join(map(shown, value))
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return "; ".join(
        numbers(value) if name == "layers" else f"{name} {shown(value)}"
        for name, value in values.items()
    )


def _gain(selection: Mapping[str, Any] | None) -> str:
    if selection is None:
        return ""
    what = "The worst gain" if "datasets" in selection else "The gain"
    return (
        f"{what} on validation is {selection['gain']:+z.1f} points, of which choosing the best of "
        f"many is worth {selection['optimism']:z.1f} by itself (95 % of resamples: "
        f"{between(selection['interval'], 1)}). The test part was looked at for the winner alone."
    )


def _provenance(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    space = found["space"]
    counts = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in found["trials"].items())
    return [
        *provenance_rows(found),
        ("objective", str(found["objective"])),
        ("sampler", str(found["sampler"])),
        ("space", _settings(space.get("choices", {}))),
        ("trials", counts),
        ("looks at the test part", str(found["test_looks"])),
    ]
