"""The tables of `tensorllm reproduce`: ours beside the published numbers, or the plan."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType

from tensorllm.reporting.tables import new_table, size

Rows = Sequence[Mapping[str, Any]]


def reproduction_tables(outcomes: Rows) -> RenderableType:
    """A table per dataset: accuracy and loss, published, ours and the difference."""
    parts: list[RenderableType] = []
    for dataset, rows in groupby(outcomes, key=lambda row: row["dataset"]):
        columns = ("published %", "ours %", "±", "published loss", "ours", "±")
        table = new_table(str(dataset), *columns, number_from=1)
        for row in rows:
            table.add_row(str(row["cell"]), *_beside(row, "accuracy"), *_beside(row, "loss"))
            if row["note"]:
                table.add_row(f"  {row['note']}", *[""] * len(columns))
        parts.append(table)
    return Group(*parts)


def rehearsal_table(rehearsals: Rows) -> RenderableType:
    """The plan: what each cell needs and takes; its code ran on a tiny model."""
    table = new_table("dataset", "cell", "layer", "examples", "time", "memory", number_from=3)
    for row in rehearsals:
        table.add_row(
            str(row["dataset"]),
            str(row["cell"]),
            "searched" if row["searched"] else "given",
            "no data" if row["examples"] is None else str(row["examples"]),
            "?" if row["seconds"] is None else f"{row['seconds'] / 3600:.2f} h",
            size(row["peak_bytes"]),
        )
    needs = sorted({str(row["needs"]) for row in rehearsals})
    return Group(
        table,
        f"{len(rehearsals)} cells ran on a tiny random model of the same architecture. Weights: "
        f"{', '.join(needs)} from the hub, or --weights FOLDER. Data: from the hub, or --data "
        "FOLDER with <dataset>.jsonl",
    )


def _beside(row: Mapping[str, Any], name: str) -> tuple[str, str, str]:
    published, ours = row["published"].get(name), (row["ours"] or {}).get(name)
    return (
        "-" if published is None else f"{published:.2f}",
        "-" if ours is None else f"{ours:.2f}",
        "-" if published is None or ours is None else f"{ours - published:+.2f}",
    )
