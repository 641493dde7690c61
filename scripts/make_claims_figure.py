"""docs/figures/claims.svg: what every winner of the study changes."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from make_figures import COLOURS, FIGURES, GREY, STYLE
from make_scaling_figures import compact
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "claims.json"
FOUND = {"better": COLOURS[1], "not known": GREY, "no better": COLOURS[3]}


def figure(found: Mapping[str, Any]) -> Figure:
    """A panel per model and dataset, a row per method; each draw a dot with its 95 % interval."""
    panels = [
        (name, dataset)
        for name, study in found.items()
        for dataset in study["datasets"]
        if any("point" in c and c["dataset"] == dataset for c in study["cells"])
    ]
    methods = list(dict.fromkeys(c["method"] for study in found.values() for c in study["cells"]))
    drawn = Figure(figsize=(7.6, 1.0 + 1.7 * -(-len(panels) // 2)), layout="constrained")
    places = drawn.subplots(-(-len(panels) // 2), 2, squeeze=False, sharey=True)
    for panel, (name, dataset) in zip(places.flat, panels, strict=False):
        panel.axvline(0, color=GREY, linewidth=1)
        panel.set_title(f"{name}, {dataset}", fontsize=9)
        panel.set_yticks(range(len(methods)), methods)
        panel.set_ylim(len(methods) - 0.4, -0.6)
        for cell in found[name]["cells"]:
            if cell["dataset"] == dataset and "point" in cell:
                change = cell["comparison"]["accuracy"]
                y = methods.index(cell["method"]) + 0.22 * (cell["draw"] - 1)
                colour = FOUND[cell["found"]]
                panel.plot(change["interval"], [y, y], color=colour, linewidth=1.5)
                panel.plot([change["difference"]], [y], "o", color=colour, markersize=4)
    for panel in list(places.flat)[len(panels) :]:
        panel.set_visible(False)
    for panel in places[-1]:
        panel.set_xlabel("change of test accuracy, points")
    keys = [Line2D([], [], color=c, marker="o", markersize=4, label=n) for n, c in FOUND.items()]
    drawn.legend(handles=keys, loc="outside upper center", ncols=len(keys))
    return drawn


def main() -> None:
    with mpl.rc_context(STYLE):
        svg = io.StringIO()
        figure(json.loads(RESULTS.read_text())).savefig(
            svg, format="svg", transparent=True, metadata={"Date": None}
        )
        FIGURES.mkdir(parents=True, exist_ok=True)
        (FIGURES / "claims.svg").write_text(compact(svg.getvalue()))


if __name__ == "__main__":
    main()
