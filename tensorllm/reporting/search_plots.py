"""The plots beside a study, as PNG and SVG."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tensorllm.reporting.page.plots_search import search_pictures
from tensorllm.reporting.page.theme import Canvas


def save_plots(
    folder: Path, rows: Sequence[Mapping[str, Any]], results: Mapping[str, Any]
) -> list[Path]:
    """Write the pictures of a study; none where matplotlib (the extra `report`) is not installed.

    Args:
        rows: of trials.parquet.
        results: the content of results.json.
    """
    if find_spec("matplotlib") is None:
        return []
    canvas = Canvas(folder)
    search_pictures(canvas, rows, results)
    return canvas.files
