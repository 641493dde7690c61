"""The terminal view of `tensorllm bench`."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType

from tensorllm.reporting.tables import new_table

ROWS = (  # what, field of the models, field of the ratios, unit
    ("prefill", "prefill_tokens_per_second", "prefill", "tokens/s"),
    ("decode", "decode_tokens_per_second", "decode", "tokens/s"),
    ("weights", "weight_bytes", "weights", "bytes"),
    ("cached keys", "key_bytes", "keys", "bytes"),
    ("cached values", "value_bytes", "values", "bytes"),
    ("peak memory", "peak_bytes", "peak", "bytes"),
)


def bench_table(found: Mapping[str, Any]) -> RenderableType:
    """Dense and factored side by side, and which sites run how."""
    models, ratios = found["models"], found["ratios"]
    table = new_table("", "dense", "factored", "gain", "unit", number_from=1)
    for what, field, ratio, unit in ROWS:
        if ratio in ratios:
            cells = [f"{models[name][field]:,.0f}" for name in ("dense", "factored")]
            table.add_row(what, *cells, f"{ratios[ratio]:.2f}x", unit)
    counts: dict[str, list[str]] = {}
    for site in found["sites"]:
        how = "factored" if site["factored"] else "dense"
        counts.setdefault(f"{how} ({site['why']})", []).append(site["site"])
    lines = [f"{how}: {', '.join(names)}" for how, names in counts.items()]
    return Group(table, *lines)
