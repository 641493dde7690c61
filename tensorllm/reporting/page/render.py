"""Render the page: one self-contained HTML file, without scripts or network access."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorllm.reporting.page.runs import Run
from tensorllm.reporting.page.searches import search_view
from tensorllm.reporting.page.sections import subject_view
from tensorllm.reporting.page.side_by_side import side_by_side
from tensorllm.reporting.page.subjects import put_together
from tensorllm.reporting.page.theme import DARK, LIGHT, Canvas, css

TEMPLATES = Path(__file__).parent / "templates"
GENERATOR = "tensorllm report"  # identifies pages written by tensorllm


def render(runs: Sequence[Run], canvas: Canvas) -> str:
    """The page of these runs; several subjects are compared at its top."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    subjects, searches = put_together(runs)
    views = [subject_view(subject, canvas, n) for n, subject in enumerate(subjects, 1)]
    studies = [search_view(run, canvas, n) for n, run in enumerate(searches, len(views) + 1)]
    style = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    colours = f":root{{{css(LIGHT)}}}@media(prefers-color-scheme:dark){{:root{{{css(DARK)}}}}}"
    content: Mapping[str, Any] = {
        "title": _title(views, studies),
        "generator": GENERATOR,
        "style": Markup(colours + style),  # from our own files only: contains nothing of a run
        "comparison": side_by_side(subjects, views, canvas) if len(subjects) > 1 else None,
        "level": 2 if len(views) + len(studies) == 1 else 3,  # of a section's heading
        "subjects": views,
        "searches": studies,
    }
    return environment.get_template("page.html").render(content)


def _title(views: Sequence[Mapping[str, Any]], studies: Sequence[Mapping[str, Any]]) -> str:
    everything = (*views, *studies)
    one = str(everything[0]["title"])
    return f"{len(everything)} runs side by side" if len(views) > 1 else one
