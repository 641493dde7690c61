"""The share of the gap between SVD-LLM and the dense model that a method closes."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def summary(rows: Sequence[Mapping[str, Any]], dense: Mapping[str, float]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of each loss and of the share closed, seed by seed.

    Args:
        rows: `scope`, `ratio`, `method`, `seed`, and a loss per text.
        dense: the dense model's loss per text.
    """
    by: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        by.setdefault((row["scope"], row["ratio"], row["method"]), []).append(row)
    out = []
    for (scope, ratio, method), some in sorted(by.items()):
        entry: dict[str, Any] = {"scope": scope, "ratio": ratio, "method": method}
        base = {row["seed"]: row for row in by.get((scope, ratio, "svd-llm"), [])}
        for text, least in dense.items():
            entry[text] = _spread([row[text] for row in some])
            closed = [
                (one[text] - row[text]) / (one[text] - least)
                for row in some
                for one in (base.values() if row["seed"] is None else [base[row["seed"]]])
            ]
            entry[f"{text} closed"] = _spread(closed)
        out.append(entry)
    return out


def _spread(values: Sequence[float]) -> dict[str, float]:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "sd": spread, "least": min(values)}
