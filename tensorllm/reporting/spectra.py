"""The terminal view of `tensorllm inspect`."""

from collections.abc import Sequence

from rich.console import Group, RenderableType

from tensorllm.compression.spectra import LayerSpectra
from tensorllm.reporting.rows import new_table

BLOCKS = " ▁▂▃▄▅▆▇█"
WIDTH = 24  # characters of a sparkline


def spectra_tables(layers: Sequence[LayerSpectra]) -> RenderableType:
    """A row per layer and mode with its spectrum as a curve, and the ranks that keep the energy."""
    shape = "×".join(str(n) for n in layers[0].shape)
    curves = new_table("layer", "mode", "size", "effective rank", "spectrum", number_from=2)
    for found in layers:
        for name, values in found.spectra.items():
            curves.add_row(
                str(found.layer),
                name,
                str(len(values)),
                f"{found.effective_ranks[name]:.1f}",
                sparkline(values),
            )
    plans = new_table(
        "layer", *(f"{100 * float(s):g} % energy" for s in layers[0].plans), number_from=1
    )
    for found in layers:
        cells = [
            f"{','.join(map(str, plan['ranks']))} ({plan['ratio']:.2f}x)"
            for plan in found.plans.values()
        ]
        plans.add_row(str(found.layer), *cells)
    return Group(
        f"attention tensors of {shape} (width, head_dim, matrices, groups); largest value left",
        curves,
        "ranks R1,R2,R3 that keep this share of the energy in every mode (compression ratio)",
        plans,
        f"predicted: {sum(found.seconds for found in layers):.2g} s to decompose these layers at "
        "given ranks; `tensorllm compress ... --dry-run` tells parameters, bytes and memory",
    )


def sparkline(values: Sequence[float]) -> str:
    """A spectrum as a curve of at most `WIDTH` characters, relative to its largest value."""
    top = values[0] or 1.0
    step = max(1, len(values) / WIDTH)
    picked = [values[int(i * step)] for i in range(min(WIDTH, len(values)))]
    return "".join(BLOCKS[round(8 * value / top)] for value in picked)
