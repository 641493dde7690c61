"""Drawings of the model and of its decompositions, as SVG in the page's colours."""

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

from markupsafe import Markup, escape

from tensorllm.compression.descriptions import modes_of, picture_of
from tensorllm.reporting.page.figures import times
from tensorllm.tensors.stacking import (
    ATTENTION_ROLES,
    FFN,
    HEADS,
    ROUTED,
    SHARED,
    families,
    family,
)

Json = Mapping[str, Any]
CELL, GAP, RIGHT = 26, 4, 84
TALL = 240  # a taller drawing stands beside the others, not in their row
GROUPS = (("attention", ATTENTION_ROLES), ("FFN", FFN), ("shared", SHARED), ("experts", ROUTED))
HEIGHT = 520  # of all layers together, at most; with more layers the rows get thinner


def model_drawing(report: Json) -> Markup:
    """Every layer with its matrices; of edited ones the remaining share is filled."""
    left = _left(report)
    there = [families(layer) for layer in report["layer_roles"]]
    known = (*ATTENTION_ROLES, *FFN, *SHARED, *ROUTED)
    roles = [role for role in known if any(role in layer for layer in there)]
    layers = len(there)
    row = max(5.0, min(34.0, HEIGHT / layers))
    start = 52 + 9 * len(str(layers - 1))  # room for "layer 27"
    groups = [next(n for n, (_, group) in enumerate(GROUPS) if role in group) for role in roles]
    apart = [14 * len({*groups[: n + 1]} - {groups[0]}) for n in range(len(roles))]
    places = {r: start + n * (CELL + GAP) + apart[n] for n, r in enumerate(roles)}
    end = places[roles[-1]] + CELL
    head = 40
    edited = sorted({layer for layer, _ in left})
    out = [
        *_captions(places),
        *(_text(places[r] + CELL / 2, 30, r.rpartition(".")[2], "role", "middle") for r in roles),
    ]
    for layer in range(layers):
        y = head + (layers - 1 - layer) * row
        high = max(3.0, row - (3 if row > 8 else 1.5))
        for role in (role for role in roles if role in there[layer]):
            part = left.get((layer, role))
            what = f"layer {layer}, {role}"
            if part is None:
                out.append(_rect(places[role], y, CELL, high, "whole", f"{what}: untouched"))
                continue
            out.append(_rect(places[role], y, CELL, high, "edited", f"{what}: {part:.1%} left"))
            width = max(1.5, min(1.0, part) * CELL)
            out.append(_rect(places[role], y, width, high, "left", f"{what}: {part:.1%} left"))
        named = row >= 13 or layer in edited or layer in (0, layers - 1)
        crowded = row < 13 and any(0 < abs(layer - e) * row < 13 and layer > e for e in edited)
        if named and not crowded:
            style = "layer on" if layer in edited else "layer"
            out.append(_text(start - 8, y + high / 2 + 4, f"layer {layer}", style, "end"))
        note = _gains(left, layer)
        if note and not crowded and note != _gains(left, layer + 1):  # once per run of equals
            out.append(_text(end + 8, y + high / 2 + 4, note, "gain", "start"))
    title = f"{layers} layers; edited: {', '.join(map(str, edited))}"
    tall = "model tall" if layers * row > TALL else "model"
    return _svg(end + RIGHT, head + layers * row + 2, out, title, tall)


def _left(report: Json) -> dict[tuple[int, str], float]:
    """The remaining share of each edited matrix; experts' matrices are taken together."""
    parts: dict[tuple[int, str], list[float]] = {}
    for site in report["sites"]:
        part = site["parameters_after"] / site["parameters_before"]
        for layer in site["layers"]:
            for role in site["roles"]:
                parts.setdefault((layer, family(role)), []).append(part)
    out = {}
    for (layer, name), found in parts.items():
        members = sum(family(role) == name for role in report["layer_roles"][layer])
        out[layer, name] = (sum(found) + members - len(found)) / members
    return out


def _gains(left: Mapping[tuple[int, str], float], layer: int) -> str:
    """How many times smaller the matrices of a layer are; empty if it is untouched."""
    gains = sorted({1 / part for (of, _), part in left.items() if of == layer})
    if not gains:
        return ""
    ends = dict.fromkeys(times(gain) for gain in (gains[0], gains[-1]))
    return "–".join(ends).replace("×–", "–")


def factor_drawing(site: Json) -> Markup | None:
    """A decomposition as boxes with areas in proportion (sides are square roots of sizes)."""
    shape, ranks = site["shape"], site["ranks"]
    by_head = modes_of(site["stacking"])[-1:] == (HEADS,)  # the head mode is not divided
    picture = picture_of(site["kind"])
    if picture == "core" and by_head and len(ranks) == len(shape) - 1:
        return _tucker(shape, ranks)
    if picture == "product" and len(shape) == 2:
        return _low_rank(shape, ranks[0])
    return None


def _tucker(shape: Sequence[int], ranks: Sequence[int]) -> Markup:
    sizes, cut = [*shape[:3], 1][:3], [*ranks, 1][:3]
    scale = 84 / sqrt(max(sizes))
    d, k, m = (max(5.0, scale * sqrt(n)) for n in sizes)
    r1, r2, r3 = (max(4.0, scale * sqrt(n)) for n in cut)
    base = 112
    out: list[Markup] = []
    x = 10.0
    heads = shape[-1]
    out += _box(x, base, k, d, m * 0.6, "w")
    out.append(_text(x + (k + m * 0.6) / 2, base + 22, "W", "name", "middle"))
    x += k + m * 0.6 + 22
    out.append(_text(x, base - 36, "≈", "sign", "middle"))
    x += 20
    out += _box(x, base, r2, r1, r3 * 0.6, "core")
    out.append(_text(x + (r2 + r3 * 0.6) / 2, base + 22, "G", "name", "middle"))
    x += r2 + r3 * 0.6
    pairs = [(d, r1), (k, r2), (m, r3)][: len(ranks)]
    for number, (rows, columns) in enumerate(pairs, 1):
        out.append(_text(x + 16, base - 36, f"×{_sub(number)}", "sign", "middle"))
        x += 32
        out.append(_rect(x, base - rows, columns, rows, "factor", ""))
        out.append(_text(x + columns / 2, base + 22, f"U{_sub(number)}", "name", "middle"))
        x += columns
    title = (
        f"W {_times(shape)} = core {_times([*ranks, heads])} and factors "
        f"{', '.join(_times(p) for p in zip(shape, ranks, strict=False))}"
    )
    return _svg(max(x + 12, 300), base + 34, out, title, "factors")


def _low_rank(shape: Sequence[int], rank: int) -> Markup:
    scale = 84 / sqrt(max(shape))
    rows, columns, r = (max(4.0, scale * sqrt(n)) for n in (*shape, rank))
    base, x = 112, 10.0
    out = [_rect(x, base - rows, columns, rows, "w", "")]
    out.append(_text(x + columns / 2, base + 22, "W", "name", "middle"))
    x += columns + 24
    out.append(_text(x, base - 36, "≈", "sign", "middle"))
    x += 24
    out.append(_rect(x, base - rows, r, rows, "factor", ""))
    out.append(_text(x + r / 2, base + 22, "U", "name", "middle"))
    x += r + 24
    out.append(_rect(x, base - r, columns, r, "factor", ""))
    out.append(_text(x + columns / 2, base + 22, "Vᵀ", "name", "middle"))
    x += columns
    title = f"W {_times(shape)} = U {shape[0]}×{rank} times V {rank}×{shape[1]}"
    return _svg(max(x + 12, 300), base + 34, out, title, "factors")


def _box(x: float, base: float, w: float, h: float, depth: float, style: str) -> list[Markup]:
    """A block in perspective: front, top and right side."""
    dx, dy = depth, depth * 0.55
    front = [(x, base), (x + w, base), (x + w, base - h), (x, base - h)]
    top = [(x, base - h), (x + w, base - h), (x + w + dx, base - h - dy), (x + dx, base - h - dy)]
    side = [(x + w, base), (x + w + dx, base - dy), (x + w + dx, base - h - dy), (x + w, base - h)]
    return [_polygon(p, f"{style} {s}") for p, s in ((front, ""), (top, "top"), (side, "side"))]


def _svg(width: float, height: float, parts: Sequence[Markup], title: str, style: str) -> Markup:
    return Markup(
        '<svg class="drawing {}" viewBox="0 0 {:g} {:g}" role="img" aria-label="{}" '
        'style="max-width:{:g}px">{}</svg>'
    ).format(style, width, height, title, width, Markup("").join(parts))


def _rect(x: float, y: float, w: float, h: float, style: str, title: str) -> Markup:
    tip = Markup("<title>{}</title>").format(title) if title else Markup("")
    return Markup(
        '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="2" class="{}">{}</rect>'
    ).format(x, y, w, h, style, tip)


def _polygon(points: Sequence[tuple[float, float]], style: str) -> Markup:
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return Markup('<polygon points="{}" class="{}"/>').format(text, style.strip())


def _text(x: float, y: float, text: str, style: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" class="{}" text-anchor="{}">{}</text>').format(
        x, y, style, anchor, escape(text)
    )


def _times(sizes: Sequence[int]) -> str:
    return "×".join(str(n) for n in sizes)


def _sub(number: int) -> str:
    return "₀₁₂₃₄"[number]


def _captions(places: Mapping[str, float]) -> list[Markup]:
    """The captions attention and FFN above their columns, where the model has them."""
    out = []
    for caption, group in GROUPS:
        at = [places[role] for role in group if role in places]
        if at:
            out.append(_text((at[0] + at[-1] + CELL) / 2, 12, caption, "caps", "middle"))
    return out
