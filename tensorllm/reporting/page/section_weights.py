"""The page's sections on the weights: decompositions, ratios, spectra and errors."""

import math
from collections.abc import Sequence
from typing import Any

from tensorllm.compression.descriptions import picture_of
from tensorllm.compression.report import RATIO_NAMES
from tensorllm.reporting.page.drawing import factor_drawing
from tensorllm.reporting.page.figures import duration, times
from tensorllm.reporting.page.plots_weights import error_pictures, spectra_pictures
from tensorllm.reporting.page.runs import Benched, Json
from tensorllm.reporting.page.subjects import Subject
from tensorllm.reporting.page.theme import Canvas
from tensorllm.reporting.tables import count, size
from tensorllm.tensors.stacking import families

MEANING = {
    "matrices_compressed": "only the matrices that were decomposed",
    "attention_of_edited_layers": "q, k, v and o of the layers that were edited",
    "all_attention": "q, k, v and o of every layer",
    "whole_model": "all parameters, embeddings included",
    "bytes_on_disk": "as stored on disk",
}


DRAWN = 4  # kinds of decompositions, of those that can be drawn; of the others the ranks are listed


def decompositions(sites: Sequence[Json]) -> list[dict[str, Any]]:
    """One drawing per kind of decomposition; last the ranks of what is not drawn.

    Sites with the same kind, roles and shape share the drawing of the first one, with the range of
    their ranks.
    """
    alike: dict[tuple[Any, ...], list[Json]] = {}
    for site in sites:
        key = (site["kind"], len(site["ranks"]), *site["roles"], *site["shape"])
        alike.setdefault(key, []).append(site)
    out: list[dict[str, Any]] = []
    rest: list[tuple[str, str]] = []
    for first, *others in sorted(alike.values(), key=_numbers, reverse=True):
        drawing = factor_drawing(first)
        name = _roles(first)
        per_mode = [set(each) for each in zip(*(s["ranks"] for s in (first, *others)), strict=True)]
        spans = [f"{min(r)} to {max(r)}" if len(r) > 1 else f"{min(r)}" for r in per_mode]
        ranks = f"{', '.join(spans)} in {len(others) + 1} layer{'s' if others else ''}"
        if drawing is None or len(out) == DRAWN:
            rest.append((f"{name}, {first['kind']}", ranks))
            continue
        rows = _factor_rows(first)
        if any(len(each) > 1 for each in per_mode):
            name += f" of layer {first['layers'][0]}"
            rows.append(("ranks", ranks))
        out.append({"drawing": drawing, "name": name, "rows": rows})
    title = "Ranks of the others" if out else "Ranks"
    return [*out, *([{"drawing": "", "name": title, "rows": rest}] if rest else [])]


def _numbers(sites: Sequence[Json]) -> int:
    """Numbers in the matrices of these sites."""
    return len(sites) * math.prod(sites[0]["shape"])


def _factor_rows(site: Json) -> list[tuple[str, str]]:
    shape, ranks = site["shape"], site["ranks"]
    if picture_of(site["kind"]) == "product":
        return [
            ("W", f"{shape[0]} × {shape[1]}"),
            ("U", f"{shape[0]} × {ranks[0]}"),
            ("Vᵀ", f"{ranks[0]} × {shape[1]}"),
        ]
    heads = shape[-1]
    rows = [
        ("W", f"{' × '.join(map(str, shape[:-1]))}, for {heads} heads"),
        ("G", f"{' × '.join(map(str, ranks))}, for {heads} heads"),
    ]
    pairs = zip(shape, ranks, strict=False)
    return rows + [(f"U{'₁₂₃'[n]}", f"{size} × {rank}") for n, (size, rank) in enumerate(pairs)]


def _roles(site: Json) -> str:
    roles = "+".join(families(site["roles"]))
    return "Attention: q, k, v and o together" if roles == "q+k+v+o" else f"Matrix “{roles}”"


def ratios(report: Json, benched: Sequence[Benched]) -> list[dict[str, str]]:
    """Every ratio by its name, with the two numbers it is computed from."""
    totals, sites, layers = report["totals"], report["sites"], report["layer_attention"]
    matrices = [sum(s[f"parameters_{when}"] for s in sites) for when in ("before", "after")]
    edited = [sum(layer[when] for layer in layers) for when in ("before", "after")]
    rest = report["untouched_attention"] if layers else 0
    numbers = {
        "matrices_compressed": [count(n) for n in matrices],
        "attention_of_edited_layers": [count(n) for n in edited],
        "all_attention": [count(n + rest) for n in edited],
        "whole_model": [count(totals[f"parameters_{w}"]) for w in ("before", "after")],
        "bytes_on_disk": [size(totals.get(f"bytes_{w}") or 0) for w in ("before", "after")],
    }
    out = [
        _ratio(RATIO_NAMES[name], MEANING[name], numbers[name], value)
        for name, value in report["ratios"].items()
    ]
    if 1 < len(layers) <= 4:
        out[1:1] = [
            _ratio(
                f"attention of layer {layer['layer']}",
                "q, k, v and o of this layer",
                (count(layer["before"]), count(layer["after"])),
                layer["ratio"],
            )
            for layer in layers
        ]
    for run in benched[:1]:
        models = run.found["models"]
        for name, key, field in (
            ("resident weights", "weights", "weight_bytes"),
            ("cached keys", "keys", "key_bytes"),
            ("cached values", "values", "value_bytes"),
        ):
            if key in run.found["ratios"]:
                pair = [size(models[which][field]) for which in ("dense", "factored")]
                out.append(_ratio(name, "in memory, as it runs", pair, run.found["ratios"][key]))
    return out


def _ratio(name: str, meaning: str, pair: Sequence[str], value: float) -> dict[str, str]:
    """A row of the table; `pair` is before and after, already formatted."""
    before, after = pair
    return {
        "name": name,
        "meaning": meaning,
        "before": before,
        "after": after,
        "ratio": times(value),
    }


def site_row(site: Json) -> dict[str, str]:
    """A site of a compression report as a row of the table."""
    return {
        "name": site["name"],
        "shape": "×".join(map(str, site["shape"])),
        "ranks": f"{site['kind']}, rank{'s' if len(site['ranks']) > 1 else ''} "
        + ", ".join(map(str, site["ranks"])),
        "before": count(site["parameters_before"]),
        "after": count(site["parameters_after"]),
        "ratio": f"{site['compression_ratio']:.2f}×",
        "error": f"{site['relative_error']:.4f}",
        "seconds": duration(site["seconds"]),
    }


def weight_pictures(subject: Subject, canvas: Canvas, prefix: str) -> list[Any]:
    """Spectra and errors of what was compressed; empty if nothing was."""
    if subject.compressed is None:
        return []
    details = subject.compressed.details
    sites = subject.compressed.report["sites"]
    return [
        *spectra_pictures(canvas, sites, details, prefix),
        *error_pictures(canvas, details, prefix),
    ]
