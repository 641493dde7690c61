"""The picture at the top of the README: two edits of a real model, and what it answers then.

    PYTHONPATH=scripts python scripts/make_real_picture.py   # from docs/results/first_contact.json

`benchmarks/first_contact.py` measures. It writes docs/images/real-light.svg and real-dark.svg, for
a <picture> that follows the theme.
"""

import json
from collections.abc import Mapping
from typing import Any

from make_picture import HEIGHT, IMAGES, QUIET, ROOT, THEMES, framed, rewritten, text

RESULTS = ROOT / "docs" / "results" / "first_contact.json"
ROLES = {"q": "attention", "k": "", "v": "", "o": "", "in": "FFN", "gate": "", "out": ""}
EDITS = {"laser": "LASER (one FFN matrix)", "hybrid": "hybrid (attention and FFN)"}
CELL, STEP, ROW, TOP = 26, 30, 8, 96  # of the drawing of the layers
SCALE = 7.5  # pixels of a point of accuracy


def main() -> None:
    found = json.loads(RESULTS.read_text())
    for theme, colours in THEMES.items():
        path = IMAGES / f"real-{theme}.svg"
        path.write_text(picture(found, {**colours, "quiet": QUIET[theme]}))
        print(path.relative_to(ROOT))


def picture(found: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    """One drawing: which matrices of which layers, what becomes of them, the accuracies."""
    layers = found["hybrid"]["report"]["model_layers"]
    parts = [
        text(4, 24, "1. Choose layers", "head"),
        text(4, 46, f"SmolLM2-135M-Instruct, {layers} layers", "note"),
        *_layers(found),
        *rewritten(found["hybrid"]["report"]),
        *_accuracies(found, 770),
    ]
    return framed(parts, _words(found), colours)


def _layers(found: Mapping[str, Any]) -> list[str]:
    """A row for each layer, the last one on top; edited matrices as full as they are left."""
    edited = {
        (layer, role): (name, site["parameters_after"] / site["parameters_before"])
        for name in EDITS
        for site in found[name]["report"]["sites"]
        for layer in site["layers"]
        for role in site["roles"]
    }
    places = {role: 64 + STEP * n + (14 if n > 3 else 0) for n, role in enumerate(ROLES)}
    out = [text(x + CELL / 2 - 2.8 * len(r), TOP - 6, r, "caps") for r, x in places.items()]
    out += [text(places[role], TOP - 22, part, "caps") for role, part in ROLES.items() if part]
    layers = found["hybrid"]["report"]["model_layers"]
    for layer in range(layers):
        y = TOP + ROW * (layers - 1 - layer)
        for role, x in places.items():
            name, left = edited.get((layer, role), ("", 0.0))
            box = f'x="{x}" y="{y}" height="{ROW - 2}" width="'
            out.append(f'<rect {box}{CELL}" class="{"edited" if name else "whole"}"/>')
            if name:
                out.append(f'<rect {box}{CELL * left:.1f}" class="left"/>')
        names = list(dict.fromkeys(name for (of, _), (name, _) in edited.items() if of == layer))
        if names:
            out.append(text(4, y + 7, f"layer {layer}", "layer on"))
            out.append(text(places["out"] + STEP + 4, y + 7, names[0], "gain"))
    return out


def _accuracies(found: Mapping[str, Any], x: float) -> list[str]:
    """A bar with its 95 % interval for the original and for each edit."""
    scores = {name: found[name]["scores"] for name in EDITS}
    bars = [("original", scores["laser"]["before"], "original")]
    bars += [(EDITS["laser"], scores["laser"], "ours"), (EDITS["hybrid"], scores["hybrid"], "best")]
    examples = scores["laser"]["examples"]
    out = [
        text(x, 24, "3. It answers better", "head"),
        text(x, 46, f"accuracy, {examples} facts of Wikidata", "note"),
    ]
    for n, (name, figures, style) in enumerate(bars):
        y = 84 + 70 * n
        value, (low, high) = figures["metrics"]["accuracy"], figures["intervals"]["accuracy"]
        size = f'width="{SCALE * value:.1f}" height="20" rx="3"'
        out += [
            text(x, y + 2, name, "bar"),
            f'<rect x="{x}" y="{y + 10}" {size} class="{style}"/>',
            _whisker(x, y + 20, low, high),
            text(x + SCALE * high + 10, y + 25, f"{value:.1f} %", "value"),
        ]
    out.append(text(x, HEIGHT - 44, "lines: 95 % intervals; points gained, paired:", "note"))
    gains = (scores[name]["comparison"]["accuracy"] for name in EDITS)
    said = ", ".join(
        f"{gain['difference']:+.1f} ({gain['interval'][0]:.1f} to {gain['interval'][1]:.1f})"
        for gain in gains
    )
    out.append(text(x, HEIGHT - 26, said, "note"))
    return out


def _whisker(x: float, y: float, low: float, high: float) -> str:
    ends = [x + SCALE * low, x + SCALE * high]
    caps = "".join(f"M{end:.1f} {y - 4}V{y + 4}" for end in ends)
    return f'<path d="M{ends[0]:.1f} {y}H{ends[1]:.1f}{caps}" class="whisker"/>'


def _words(found: Mapping[str, Any]) -> str:
    scores = found["hybrid"]["scores"]
    before, after = (s["metrics"]["accuracy"] for s in (scores["before"], scores))
    return (
        f"SmolLM2-135M-Instruct on facts of Wikidata: accuracy {before:.1f} per cent before, "
        f"{after:.1f} per cent after the hybrid edit of one layer"
    )


if __name__ == "__main__":
    main()
