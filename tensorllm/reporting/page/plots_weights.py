"""Plots of what was done to the weights: spectra with their cuts, errors per matrix and head."""

from collections.abc import Mapping, Sequence
from math import hypot, prod
from typing import Any

from tensorllm.compression.descriptions import modes_of, numbers
from tensorllm.reporting.page.heatmap import heatmap
from tensorllm.reporting.page.theme import Canvas, PagePicture, colour, shades
from tensorllm.tensors.stacking import ATTENTION, ATTENTION_ROLES, FEED_FORWARD, families, family

Json = Mapping[str, Any]
NAMED = 6  # lines that the legend names


def spectra_pictures(
    canvas: Canvas, sites: Sequence[Json], details: Mapping[str, Json], prefix: str
) -> list[PagePicture]:
    """One plot per kind of site and mode, with a line per site and a dot at its cut."""
    groups: dict[tuple[str, int, bool], list[tuple[Json, Json]]] = {}
    for site in sites:
        for spectrum in details.get(site["name"], {}).get("spectra", ()):
            roles = "".join(families(site["roles"]))
            key = (roles, spectrum["mode"], len(site["shape"]) == 2)
            groups.setdefault(key, []).append((site, spectrum))
    return [
        _spectra(canvas, roles, mode, flat, pairs, f"{prefix}spectrum-{roles}-{mode + 1}")
        for (roles, mode, flat), pairs in groups.items()
    ]


def _spectra(
    canvas: Canvas,
    roles: str,
    mode: int,
    flat: bool,
    pairs: Sequence[tuple[Json, Json]],
    name: str,
) -> PagePicture:
    with canvas.axes() as axes:
        for (site, spectrum), shade in zip(pairs, shades(len(pairs)), strict=True):
            top = spectrum["values"][0] or 1.0
            at, values = spectrum["at"], [max(v / top, 1e-6) for v in spectrum["values"]]
            label = numbers(site["layers"]) if len(pairs) <= NAMED else None
            axes.plot(at, values, color=shade, label=label, marker="." if len(at) < 12 else None)
            if spectrum["rank"] is not None:
                rank = spectrum["rank"]
                near = min(range(len(at)), key=lambda n: abs(at[n] - rank))
                axes.plot(rank, values[near], "o", color=colour("bad"), ms=5.5, zorder=3)
        if len(pairs) == 1 and pairs[0][1]["rank"] is not None:
            axes.axvspan(0, pairs[0][1]["rank"], color=colour("seq1"), lw=0, zorder=0)
        low = min(v / (s["values"][0] or 1.0) for _, s in pairs for v in s["values"])
        if 0 < low < 0.05:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        axes.set(xlabel="singular value number", ylabel="relative to the largest")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlim(0, max(max(spectrum["at"]) for _, spectrum in pairs) * 1.02 + 0.2)
        if low >= 0.05:
            axes.set_ylim(0, 1.05)
        if 1 < len(pairs) <= NAMED:
            axes.legend()
        title = _title(pairs[0][0], roles, None if flat else mode)
        alt = f"Falling curve of the singular values: {title}"
        return canvas.picture(axes, name, title=title, caption=_cut(pairs), alt=alt)


def _title(site: Json, roles: str, mode: int | None) -> str:
    part = "Attention" if set(roles) <= set(ATTENTION_ROLES) else "FFN"
    named = "+".join(families(site["roles"]))
    if mode is None:
        return f"{part} matrix {named} ({site['shape'][0]} × {site['shape'][1]})"
    matrix = "" if set(roles) == set(ATTENTION) else f" {named}"
    name = "".join(f": {modes}" for modes in modes_of(site["stacking"])[mode : mode + 1])
    return f"{part}{matrix}, mode {mode + 1}{name}"


def _cut(pairs: Sequence[tuple[Json, Json]]) -> str:
    """The caption that explains the dots."""
    site, first = pairs[0]
    size = min(first["size"], prod(site["shape"]) // first["size"])
    ranks = sorted({s["rank"] for _, s in pairs if s["rank"] is not None})
    if not ranks:
        return f"All {size} singular values."
    if ranks == [size]:
        return f"All {size} are kept: nothing was cut in this mode."
    kept = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    if max(max(s["at"]) for _, s in pairs) <= ranks[-1] < size:
        return f"{kept} of {size} kept; the rest is not computed at this size."
    return f"{kept} of {size} kept; what is right of the dot was cut."


def error_pictures(canvas: Canvas, details: Mapping[str, Json], prefix: str) -> list[PagePicture]:
    """Heatmaps of relative errors: matrix by layer, and head by layer or matrix."""
    matrices = [matrix for record in details.values() for matrix in record["matrices"]]
    if not matrices:
        return []
    out = []
    layers = sorted({m["layer"] for m in matrices})
    found: dict[tuple[str, int], list[float]] = {}  # the same matrix of all experts is one entry
    for m in matrices:
        found.setdefault((family(m["role"]), m["layer"]), []).append(m["relative_error"])
    errors = {where: hypot(*each) / len(each) ** 0.5 for where, each in found.items()}
    known = (*ATTENTION_ROLES, *FEED_FORWARD)
    roles = [role for role in known if any(role == of for of, _ in errors)]
    if len(errors) > 1:
        cells = [[errors.get((role, layer)) for layer in layers] for role in roles]
        out.append(
            heatmap(
                canvas,
                f"{prefix}error-matrices",
                cells,
                rows=roles,
                columns=[str(layer) for layer in layers],
                names=("matrix", "layer"),
                title="Relative error per matrix and layer",
            )
        )
    return out + _head_errors(canvas, matrices, prefix)


def _head_errors(canvas: Canvas, matrices: Sequence[Json], prefix: str) -> list[PagePicture]:
    with_heads = [m for m in matrices if m.get("heads")]
    if not with_heads:
        return []
    layers = sorted({m["layer"] for m in with_heads})
    count = max(len(m["heads"]) for m in with_heads)
    if len(layers) == 1:
        rows = [m["role"] for m in with_heads]
        cells = [[*m["heads"], *[None] * (count - len(m["heads"]))] for m in with_heads]
        title, names = f"Relative error per head, layer {layers[0]}", ("matrix", "head")
    else:
        by_layer = {
            layer: _together([m["heads"] for m in with_heads if m["layer"] == layer], count)
            for layer in layers
        }
        rows = [str(layer) for layer in layers]
        cells = [by_layer[layer] for layer in layers]
        title, names = "Relative error per head, its matrices together", ("layer", "head")
    return [
        heatmap(
            canvas,
            f"{prefix}error-heads",
            cells,
            rows=rows,
            columns=[str(head) for head in range(count)],
            names=names,
            title=title,
        )
    ]


def _together(heads: Sequence[Sequence[float]], count: int) -> list[float | None]:
    """Root mean square over a layer's matrices; for each head over those that have it."""
    out: list[float | None] = []
    for head in range(count):
        found = [values[head] for values in heads if head < len(values)]
        out.append(hypot(*found) / len(found) ** 0.5 if found else None)
    return out
