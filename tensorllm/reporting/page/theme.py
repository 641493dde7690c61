"""Colours of page and plots; plots in the page follow its light or dark theme.

Plots are drawn in the light colours. In the page every such colour becomes a CSS variable, so that
one drawing serves both themes.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

LIGHT = {  # all different: a colour in a plot is recognised by its code
    "ink": "#1c2128",
    "muted": "#5b6472",
    "line": "#e3e5e9",
    "card": "#ffffff",
    "accent": "#2f5bd0",
    "before": "#98a1af",
    "good": "#1d7f4e",
    "bad": "#b8472f",
    "on": "#fefefe",
    "seq1": "#edf1fc",
    "seq2": "#cfdaf7",
    "seq3": "#a9bdf0",
    "seq4": "#7b98e4",
    "seq5": "#4f75d9",
    "seq6": "#2748a8",
}
DARK = {
    "ink": "#e7eaef",
    "muted": "#a0a9b8",
    "line": "#323943",
    "card": "#1b2027",
    "accent": "#8fb0ff",
    "before": "#7b8494",
    "good": "#5cc88f",
    "bad": "#f08a6f",
    "on": "#10141a",
    "seq1": "#232b3a",
    "seq2": "#2b3a58",
    "seq3": "#385083",
    "seq4": "#4a6cb4",
    "seq5": "#6f94e6",
    "seq6": "#b3c9ff",
}
SEQUENCE = [f"seq{n}" for n in range(1, 7)]
NAMES = {code: name for name, code in LIGHT.items()}
WIDTH = 3.5  # inches: as wide as a telephone; a page shows several side by side


@dataclass(frozen=True, slots=True)
class PagePicture:
    """A plot in the page: `svg` uses the page's colours; `alt` describes the picture."""

    name: str
    title: str
    caption: str
    alt: str
    svg: str


def css(colours: dict[str, str]) -> str:
    """The colours as CSS variables."""
    return "".join(f"--{name}:{code};" for name, code in colours.items())


def colour(name: str) -> str:
    """The light theme's code of a colour, which the page replaces by its own."""
    return LIGHT[name]


def shades(count: int) -> list[str]:
    """`count` colours from light to dark, for lines that have an order."""
    picked = SEQUENCE[2:] if count > 1 else ["accent"]
    return [LIGHT[picked[round(n * (len(picked) - 1) / max(1, count - 1))]] for n in range(count)]


class Canvas:
    """Draws plots, and saves each as PNG and SVG in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[Path] = []

    @contextmanager
    def axes(self, height: float = 2.6) -> Iterator[Any]:
        """Axes of a new figure, in the page's style."""
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        with rc_context(STYLE):
            figure = Figure(figsize=(WIDTH, height), layout="constrained")
            FigureCanvasAgg(figure)
            yield figure.subplots()

    def picture(self, axes: Any, name: str, *, title: str, caption: str, alt: str) -> PagePicture:
        """Save what is drawn; call it before the block of `axes` ends."""
        figure = axes.figure
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
        figure.set_layout_engine("none")  # laid out already; again would take as long as drawing
        self.folder.mkdir(parents=True, exist_ok=True)
        for ending in ("png", "svg"):
            path = self.folder / f"{name}.{ending}"
            figure.savefig(path, dpi=200, metadata={"Date": None} if ending == "svg" else None)
            self.files.append(path)
        return PagePicture(name, title, caption, alt, _inline(text.getvalue(), name))


def _inline(svg: str, name: str) -> str:
    """SVG for embedding: with the page's colours and fonts, and ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 aria-hidden="true"', svg, count=1)
    svg = re.sub(r"(\bid=\"|href=\"#|url\(#)", rf"\g<1>{name}-", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", svg)
    return re.sub(
        r"#[0-9a-f]{6}\b",
        lambda m: f"var(--{NAMES[m.group()]})" if m.group() in NAMES else m.group(),
        svg,
    )


STYLE: Any = {  # matplotlib's settings are typed one by one
    "svg.fonttype": "none",
    "svg.hashsalt": "tensorllm",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.labelsize": 9.5,
    "axes.edgecolor": LIGHT["line"],
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": LIGHT["card"],
    "savefig.facecolor": "auto",
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.8,
    "xtick.color": LIGHT["line"],
    "ytick.color": LIGHT["line"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": LIGHT["ink"],
    "lines.linewidth": 1.7,
    "text.parse_math": False,  # a name may contain two dollar signs
}
