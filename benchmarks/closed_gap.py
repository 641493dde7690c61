"""The share of the gap between SVD-LLM and the dense model that a method closes.

python benchmarks/closed_gap.py docs/results/whole_model.json     # the tables of the docs
"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOSSES = ("shared-tucker", "asvd", "svd-llm", "ours")
SHARES = ("svd-llm pivoted", "ours weighting=loss", "ours")


def summary(rows: Sequence[Mapping[str, Any]], dense: Mapping[str, float]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of each loss and of the share closed, seed by seed.

    Args:
        rows: `scope`, `ratio`, `method`, `seed`, and a loss per text.
        dense: the dense model's loss per text.
    """
    by: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if not row["method"].endswith("moments"):
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
        entry["seconds"] = statistics.mean(row.get("seconds", 0.0) for row in some)
        out.append(entry)
    return out


def _spread(values: Sequence[float]) -> dict[str, float]:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "sd": spread, "least": min(values)}


def table(found: Mapping[str, Any], text: str) -> str:
    """Markdown: losses in nats per token, then shares closed in per cent over the seeds."""
    heads = ["scope", "ratio", *LOSSES, *(f"{method}: closed" for method in SHARES)]
    lines = [heads, ["---"] * len(heads)]
    cells = {(e["scope"], e["ratio"], e["method"]): e for e in found["summary"]}
    for scope, ratio in sorted({key[:2] for key in cells}):
        losses = [f"{cells[scope, ratio, method][text]['mean']:.3f}" for method in LOSSES]
        shares = [cells[scope, ratio, method][f"{text} closed"] for method in SHARES]
        closed = [f"{100 * share['mean']:.1f} ± {100 * share['sd']:.1f}" for share in shares]
        lines.append([scope, f"{ratio:g}", *losses, *closed])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    for name, found in json.loads(Path(sys.argv[1]).read_text()).items():
        for text, loss in found["dense"].items():
            print(f"\n{name}, {text}: dense {loss:.3f}\n\n{table(found, text)}")


if __name__ == "__main__":
    main()
