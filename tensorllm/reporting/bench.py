"""The terminal view of `tensorllm bench`."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType

from tensorllm.reporting.rows import new_table
from tensorllm.reporting.tables import size

ROWS = (  # what, field of the models, field of the ratios, unit
    ("prefill", "prefill_tokens_per_second", "prefill", "tokens/s"),
    ("decode", "decode_tokens_per_second", "decode", "tokens/s"),
    ("weights", "weight_bytes", "weights", "bytes"),
    ("cached keys", "key_bytes", "keys", "bytes"),
    ("cached values", "value_bytes", "values", "bytes"),
    ("peak memory", "peak_bytes", "peak", "bytes"),
)

FEW = 8  # sites that are named


def in_units(value: float, unit: str) -> str:
    """A value with its unit, such as `2.39 MiB`, `2,106 tokens/s`, `17.3 tokens/s`."""
    if unit == "bytes":
        return size(int(value))
    return f"{value:,.{0 if value >= 100 else 1}f} {unit}"


def bench_table(found: Mapping[str, Any]) -> RenderableType:
    """Dense and factored side by side, and how each site runs."""
    models, ratios = found["models"], found["ratios"]
    turns = (
        f"a prompt of {found['prompt_tokens']} tokens, {found['new_tokens']} decoded behind it; "
        f"medians of {found['repeats']} turns"
    )
    table = new_table("", "dense", "factored", "gain", number_from=1)
    for what, field, ratio, unit in ROWS:
        if ratio in ratios:
            cells = [in_units(models[name][field], unit) for name in ("dense", "factored")]
            table.add_row(what, *cells, f"{ratios[ratio]:.2f}x")
    counts: dict[str, list[str]] = {}
    for site in found["sites"]:
        how = "factored" if site["factored"] else "dense"
        counts.setdefault(f"{how} ({site['why']})", []).append(site["site"])
    lines = [f"{how}: {_named(names)}" for how, names in counts.items()]
    return Group(turns, table, *lines)


def _named(sites: list[str]) -> str:
    """The sites' names; if there are many, their number and the first few."""
    if len(sites) <= FEW:
        return ", ".join(sites)
    return f"{len(sites)} sites, {', '.join(sites[:3])}, ... (--json names all)"
