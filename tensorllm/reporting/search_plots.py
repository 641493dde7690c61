"""The plots beside a study, as PNG and SVG."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tensorllm.reporting.page.plots_search import search_pictures
from tensorllm.reporting.page.plots_weights import spectra_pictures
from tensorllm.reporting.page.theme import Canvas

Json = Mapping[str, Any]


def save_plots(
    folder: Path,
    rows: Sequence[Json],
    results: Json,
    sites: Sequence[Json],
    details: Mapping[str, Json],
) -> list[Path]:
    """Save the plots of a study; none if matplotlib (the extra `report`) is not installed.

    Args:
        folder: of the study.
        rows: of trials.parquet.
        results: the content of results.json.
        sites, details: of the winner's compression, as in its report.

    Returns:
        The files written.
    """
    if find_spec("matplotlib") is None:
        return []
    canvas = Canvas(folder)
    search_pictures(canvas, rows, results)
    spectra_pictures(canvas, sites, details, prefix="")
    return canvas.files
