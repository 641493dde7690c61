"""The README's picture of the demo: what is changed in the demo model, and what comes of it.

    python scripts/make_picture.py             # draws from docs/results/demo.json
    python scripts/make_picture.py --measure   # measures anew first (a minute)

It writes docs/images/demo-light.svg and demo-dark.svg, for a <picture> that follows the theme.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorllm.environment import environment
from tensorllm.reporting.page.drawing import factor_drawing, model_drawing
from tensorllm.reporting.page.theme import DARK, LIGHT

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "demo.json"
IMAGES = ROOT / "docs" / "images"
MODES = {"laser": "LASER (FFN)", "shared-tucker": "shared Tucker (attention)", "hybrid": "hybrid"}
WIDTH, HEIGHT = 1060, 344
THEMES = {"light": LIGHT, "dark": DARK}
QUIET = {"light": "#e9ecf1", "dark": "#2a313b"}
SANS = "system-ui,-apple-system,'Segoe UI',Roboto,Helvetica,Arial,sans-serif"
STYLE = f"""
text{{font-family:{SANS};font-size:12px;fill:var(--muted)}}
.head{{font-size:16px;font-weight:600;fill:var(--ink)}} .note{{font-size:13px}}
.bar{{font-size:13.5px;fill:var(--ink)}} .value{{font-size:14px;font-weight:600;fill:var(--ink)}}
.layer.on,.name{{fill:var(--ink);font-weight:600}} .gain{{fill:var(--accent);font-weight:600}}
.sign{{font-size:16px}} .name{{font-size:14px}} .caps{{font-size:10.5px}}
.whole,.w{{fill:var(--quiet)}} .w{{stroke:var(--before);stroke-width:.8}} .w.top{{fill:var(--card)}}
.w.side{{fill:var(--line)}} .edited{{fill:var(--seq2)}}
.left,.factor,.core,.best{{fill:var(--accent)}} .ours{{fill:var(--seq4)}}
.core.top{{fill:var(--seq4)}} .core.side{{fill:var(--seq6)}} .original{{fill:var(--before)}}
.whisker{{stroke:var(--ink);stroke-width:1.5;fill:none}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="measure the demo anew first")
    if parser.parse_args().measure:
        RESULTS.write_text(json.dumps(measure(), indent=2) + "\n")
    found = json.loads(RESULTS.read_text())
    IMAGES.mkdir(parents=True, exist_ok=True)
    for theme, colours in THEMES.items():
        path = IMAGES / f"demo-{theme}.svg"
        path.write_text(picture(found, {**colours, "quiet": QUIET[theme]}))
        print(path.relative_to(ROOT))


def measure() -> dict[str, Any]:
    """The reports of the shipped demo recipes, scores included."""
    reports = {}
    for mode in MODES:
        command = [sys.executable, "-m", "tensorllm", "compress", "--model", "demo", "--json"]
        done = subprocess.run(
            [*command, "--mode", mode], capture_output=True, text=True, check=True
        )
        reports[mode] = json.loads(done.stdout)
    return {
        "reports": reports,
        **environment(),
        "command": "python scripts/make_picture.py --measure",
    }


def picture(found: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    """One drawing: the model, the decompositions, the accuracies."""
    reports = found["reports"]
    hybrid = reports["hybrid"]
    parts = [
        text(4, 24, "1. Choose layers", "head"),
        text(4, 46, "filled: what is left of an edited matrix", "note"),
        placed(str(model_drawing(hybrid)), 0, 72, 1.22),
        *rewritten(hybrid),
        *_accuracies(reports, 770),
    ]
    return framed(parts, _words(reports), colours)


def rewritten(hybrid: Mapping[str, Any]) -> list[str]:
    """How the hybrid's two sites become factors."""
    tucker, product = (factor_drawing(site) for site in hybrid["sites"][:2])
    rank = hybrid["sites"][1]["ranks"][0]
    return [
        text(394, 24, "2. Rewrite their weights", "head"),
        text(394, 46, "attention: all heads and q, k, v, o share factors", "note"),
        placed(str(tucker), 384, 44, 1.0),
        text(394, 206, f"FFN: one matrix as a product of rank {rank}", "note"),
        placed(str(product), 384, 196, 1.0),
    ]


def framed(parts: Sequence[str], words: str, colours: Mapping[str, str]) -> str:
    """The whole drawing, with a sentence for those who do not see it."""
    drawn = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{words}">'
        f"<style>{STYLE}</style>{''.join(parts)}</svg>\n"
    )
    return re.sub(r"var\(--(\w+)\)", lambda m: colours[m.group(1)], drawn)


def _accuracies(reports: Mapping[str, Any], x: float) -> list[str]:
    """A bar for the original and one for each way of compressing it."""
    evaluation = reports["hybrid"]["evaluation"]
    bars = [("original", evaluation["before"]["accuracy"], "original")]
    for mode, name in MODES.items():
        style = "best" if mode == "hybrid" else "ours"
        bars.append((name, reports[mode]["evaluation"]["after"]["accuracy"], style))
    examples = evaluation["after"]["examples"]
    out = [
        text(x, 24, "3. It answers better", "head"),
        text(x, 46, f"accuracy, {examples:,} questions not chosen on", "note"),
    ]
    for n, (name, value, style) in enumerate(bars):
        y = 84 + 62 * n
        out.append(text(x, y + 2, name, "bar"))
        size = f'width="{2.8 * value:.1f}" height="20" rx="3"'
        out.append(f'<rect x="{x}" y="{y + 10}" {size} class="{style}"/>')
        out.append(text(x + 2.8 * value + 8, y + 25, f"{value:.1f} %", "value"))
    return out


def _words(reports: Mapping[str, Any]) -> str:
    after = reports["hybrid"]["evaluation"]
    return (
        f"The demo model: accuracy {after['before']['accuracy']:.1f} per cent before, "
        f"{after['after']['accuracy']:.1f} per cent after the hybrid compression"
    )


def placed(svg: str, x: float, y: float, scale: float) -> str:
    """A drawing of the page at a place of the picture, in its own size."""
    inner = svg[svg.index(">") + 1 : svg.rindex("</svg>")]
    return f'<g transform="translate({x} {y}) scale({scale})">{inner}</g>'


def text(x: float, y: float, words: str, style: str) -> str:
    """Words at a place of the picture."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}">{words}</text>'


if __name__ == "__main__":
    main()
