"""The tables of `tensorllm reproduce --study claims`."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType

from tensorllm.reporting.rows import new_table


def claims_tables(found: Mapping[str, Any]) -> RenderableType:
    """For each dataset a row per method and draw: accuracies in per cent, changes in points."""
    parts: list[RenderableType] = []
    for dataset, about in found["datasets"].items():
        cells = [cell for cell in found["cells"] if cell["dataset"] == dataset]
        parts.append(_cells(dataset, about, cells))
        parts += [
            f"{c['method']}, draw {c['draw']}: {c['sentence']}"
            for c in cells
            if c.get("shifted_prior")
        ]
    verdicts = ", ".join(f"{n} {name}" for name, n in found["counts"].items() if name != "holm")
    parts.append(
        f"{len(found['cells'])} cells: {verdicts}; better when all are tests of one study (Holm): "
        f"{found['counts']['holm']}"
    )
    return Group(*parts)


def _cells(
    dataset: str, about: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]
) -> RenderableType:
    table = new_table(
        dataset, "draw", "edit", "validation", "test", "change", "found", number_from=3
    )
    table.padding = (0, 0, 0, 1)
    if about["original"] is not None:
        table.add_row("original", "", "", "", _percent(about["original"]["accuracy"]["value"]))
    for cell in cells:
        row = [cell["method"], f"{cell['draw']}"]
        if "point" in cell:
            validation, change = cell["validation"], cell["comparison"]["accuracy"]
            both = (validation[part]["accuracy"] for part in ("original", "winner"))
            low, high = change["interval"]
            row += [
                cell["edit"],
                "→".join(map(_percent, both)),
                _percent(cell["test"]["accuracy"]["value"]),
                f"{change['difference']:+z.1f}±{(high - low) / 2:.1f}",
            ]
        table.add_row(*row, *[""] * (6 - len(row)), cell["found"])
    return table


def _percent(accuracy: float) -> str:
    return f"{accuracy:.1f}"
