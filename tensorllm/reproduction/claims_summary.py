"""Results of the claim study's cells: verdicts, guards, and which answers changed."""

from collections.abc import Mapping, Sequence
from typing import Any

from tensorllm.evaluation.predictions import Prediction
from tensorllm.evaluation.statistics import compared, intervals
from tensorllm.evaluation.totals import metrics_of
from tensorllm.reproduction.claims import GOAL
from tensorllm.reproduction.frequency import by_frequency, changed, generic, trend
from tensorllm.search.verdict import LEVEL, guards_of, verdict

NOT_RUN = "not run"
REFUSED = "not for this model"


def scores(rows: Sequence[Prediction]) -> dict[str, Any]:
    """Accuracy (per cent) and loss (nats per token) with their intervals."""
    metrics, sure = metrics_of(rows), intervals(rows, seed=0)
    return {name: {"value": metrics[name], "interval": sure[name]} for name in ("accuracy", "loss")}


def result_of(
    chosen: Mapping[str, Any],
    before: Sequence[Prediction],
    after: Sequence[Prediction],
    frequency: Sequence[int],
) -> dict[str, Any]:
    """A cell: its edit, both parts' scores, the verdict, the guards and the answers' frequency."""
    comparison = {**compared(before, after, seed=0), "asked": True}
    guards = guards_of(before, after)
    found = verdict(comparison, chosen["selection"], guards, GOAL)
    return {
        **found,
        "point": chosen["point"],
        "edit": edit_text(chosen["point"]),
        "validation": {
            "examples": chosen["original"]["seen"],
            **{
                name: {part: chosen[name][part] for part in ("accuracy", "loss")}
                for name in ("original", "winner")
            },
        },
        "ratio": chosen["winner"]["ratio"],
        "trials": len(chosen["trials"]),
        "selection": chosen["selection"],
        "test": scores(after),
        "comparison": comparison,
        "guards": guards,
        "by_frequency": by_frequency(before, after, frequency),
        "trend": trend(before, after, frequency),
        "generic": generic(before, after),
        "changed": changed(before, after),
    }


def edit_text(point: Mapping[str, Any]) -> str:
    """Layer and settings in short, such as `29: gate 0.4`."""
    layers = "+".join(map(str, point["layers"]))
    settings = {k: v for k, v in point["settings"].items() if k != "layout"}
    named = ("+".join(map(str, v)) if k == "matrices" else _ranks(v) for k, v in settings.items())
    return f"{layers}: {' '.join(named)}"


def _ranks(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else f"{value:g}"


def corrected(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells with `p_holm`, corrected for testing all cells in one study (Holm 1979).

    Cells that were not run stay as they are.
    """
    known = sorted((cell["p"], n) for n, cell in enumerate(cells) if "p" in cell)
    out, least = [dict(cell) for cell in cells], 0.0
    for rank, (p, n) in enumerate(known):
        least = max(least, min(1.0, p * (len(known) - rank)))
        out[n]["p_holm"] = least
    return out


def counts(cells: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Number of cells with each verdict, and of those still better after Holm's correction."""
    found = [str(cell["found"]) for cell in cells]
    better = [c for c in cells if c["found"] == "better" and c["p_holm"] <= LEVEL]
    return {**{name: found.count(name) for name in dict.fromkeys(found)}, "holm": len(better)}
