"""The tables of `tensorllm reproduce`: measured beside published figures, or the plan."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from tensorllm.reporting.rows import new_table
from tensorllm.reporting.tables import duration, size

Rows = Sequence[Mapping[str, Any]]
MARKS = {"searched": "*", "given": "+"}
LEGEND = {
    "searched": "searched: this layer was never published; it is the best on the validation part",
    "given": "given by --layer: this layer was never published",
}


def reproduction_tables(outcomes: Rows) -> RenderableType:
    """A table per dataset: accuracy and loss, published, measured and the difference."""
    parts: list[RenderableType] = []
    for dataset, rows in groupby(outcomes, key=lambda row: row["dataset"]):
        columns = ("acc. %\npubl.", "\nmeas.", "\n±", "loss\n  publ.", "\nmeas.", "\n±")
        table = new_table(f"{dataset}\n", "layer\n", *columns, number_from=1)
        table.padding = (0, 0)
        for row in rows:
            table.add_row(
                str(row["cell"]), _layer(row), *_beside(row, "accuracy"), *_beside(row, "loss")
            )
        parts.append(table)
    origins = {row["layers_origin"] for row in outcomes}
    parts += [Text(f"{MARKS[name]} {text}") for name, text in LEGEND.items() if name in origins]
    return Group(*parts)


def rehearsal_table(plan: Mapping[str, Any]) -> RenderableType:
    """The plan: what each cell costs; its code was run on a tiny model."""
    table = new_table("cell", "layer", "examples", "time", "memory", number_from=2)
    cells = plan["cells"]
    for dataset, rows in groupby(cells, key=lambda row: row["dataset"]):
        table.add_row(Text(str(dataset), style="bold"))
        for row in rows:
            table.add_row(
                f"  {row['cell']}",
                "to search" if row["searched"] else "",
                f"{row['examples']}" if row["counted"] else f"~{row['examples']}",
                duration(row["seconds"]),
                size(row["peak_bytes"]),
            )
    parts: list[RenderableType] = [
        table,
        f"{len(cells)} cells ran on a tiny random model of {plan['hub']}'s architecture. In all "
        f"at most about {duration(plan['seconds'])} on this device, and loading the weights.",
    ]
    if any(not row["counted"] for row in cells):
        parts.append("~ as many examples as the papers have; --data FOLDER counts them")
    if plan["float32_seconds"] is not None:
        parts.append(f"--dtype fp32 is faster here: {duration(plan['float32_seconds'])}")
    if plan["missing"]:
        parts.append(Text("Not on this machine; the hub will be asked. Offline:", style="bold"))
        parts += [Text(f"- {line}") for line in plan["missing"]]
    return Group(*parts)


def _layer(row: Mapping[str, Any]) -> str:
    layers = ",".join(str(layer) for layer in row["layers"] or ())
    return layers + MARKS.get(row["layers_origin"], " ")


def _beside(row: Mapping[str, Any], name: str) -> tuple[str, str, str]:
    published, measured = row["published"].get(name), (row["measured"] or {}).get(name)
    return (
        "-" if published is None else f"{published:.2f}",
        "-" if measured is None else f"{measured:.2f}",
        "-" if published is None or measured is None else f"{measured - published:+z.2f}",
    )
