"""Two folders of results side by side."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from tensorllm.errors import UserError
from tensorllm.evaluation.results import read_results
from tensorllm.evaluation.statistics import compared
from tensorllm.evaluation.summary import metrics_of


def compare(before: Path, after: Path, seed: int = 0) -> dict[str, Any]:
    """What changed from one folder of results to another, over the examples both have.

    Returns:
        The two results, their `metrics` over the common examples, the statistics of `compared`
        over these, and those that went from wrong to right (`mended`) and back (`broken`).
    """
    (first, old), (second, new) = read_results(before), read_results(after)
    if first["dataset"] != second["dataset"] or first["protocol"] != second["protocol"]:
        raise UserError(
            f"only results of one dataset and protocol compare, got {first['dataset']} "
            f"({first['protocol']}) and {second['dataset']} ({second['protocol']})"
        )
    found = {(row.index, row.prompt, row.answer): row for row in new}
    pairs = [(r, found[k]) for r in old if (k := (r.index, r.prompt, r.answer)) in found]
    if not pairs:
        raise UserError(f"{before} and {after} have no example in common")
    changed = [(was, now) for was, now in pairs if was.correct != now.correct]
    common = {"before": [was for was, _ in pairs], "after": [now for _, now in pairs]}
    return {
        "before": first,
        "after": second,
        "metrics": {when: metrics_of(rows) for when, rows in common.items()},
        "comparison": compared(common["before"], common["after"], seed),
        "mended": [asdict(now) for _, now in changed if now.correct],
        "broken": [asdict(now) for _, now in changed if not now.correct],
    }
