"""What is printed, as text."""

import os
from pathlib import Path

from rich.console import Console, RenderableType


def shown(table: RenderableType) -> str:
    """As a terminal of 80 columns shows it."""
    with Path(os.devnull).open("w") as nowhere:
        console = Console(width=80, highlight=False, record=True, file=nowhere)
        console.print(table)
        text = console.export_text()
    assert max(len(line) for line in text.splitlines()) <= 80
    return text
