"""The curves of docs/scaling.md, drawn from docs/results/scaling.json."""

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
from make_figures import COLOURS, FIGURES, GREY, STYLE
from matplotlib.figure import Figure

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "scaling.json"
COLUMNS = 3


def curves(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Every curve of every part, by its name."""
    return {
        name: curve
        for part in parts.values()
        for name, curve in part["curves"].items()
        if "points" in curve
    }


def figure(found: Mapping[str, Any]) -> Figure:
    """A panel for each curve: the times, and the power law through them."""
    rows = -(-len(found) // COLUMNS)
    drawn = Figure(figsize=(7.6, 2.3 * rows), layout="constrained")
    panels = list(drawn.subplots(rows, COLUMNS, squeeze=False).flat)
    for panel, (name, curve) in zip(panels, found.items(), strict=False):
        xs, ys = zip(*curve["points"], strict=True)
        law = [curve["factor"] * x ** curve["exponent"] for x in xs]
        panel.plot(xs, law, color=GREY, linewidth=1)
        panel.plot(xs, ys, "o", color=COLOURS[0], markersize=4)
        panel.set(xscale="log", yscale="log", xlabel=curve["over"])
        title = fill(name.partition(", over")[0], 30)
        panel.set_title(f"{title}\n{exponent(curve)}", fontsize=9)
        panel.minorticks_off()
        panel.set_xticks([xs[0], xs[-1]], [short(xs[0]), short(xs[-1])])
    for panel in panels[::COLUMNS]:
        panel.set_ylabel("seconds")
    for panel in panels[len(found) :]:
        panel.set_visible(False)
    return drawn


def exponent(curve: Mapping[str, Any]) -> str:
    return f"exponent {curve['exponent']:.2f} ± {curve['plus_minus']:.2f}"


def short(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"


def main() -> None:
    with mpl.rc_context(STYLE):
        drawn = figure(curves(json.loads(RESULTS.read_text())))
        FIGURES.mkdir(parents=True, exist_ok=True)
        svg = io.StringIO()
        drawn.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        (FIGURES / "scaling.svg").write_text(compact(svg.getvalue()))


def compact(svg: str) -> str:
    """The same picture without indentation, in hundredths of a point."""
    rounded = re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", svg)
    return "".join(f"{line.strip()}\n" for line in rounded.splitlines())


if __name__ == "__main__":
    main()
