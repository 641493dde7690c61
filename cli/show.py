"""Printing: tables for people, JSON for machines, progress with time left."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

from tensorllm_cli.volume import is_quiet

Update = Callable[[int, int, str], None]


def print_result(value: RenderableType) -> None:
    """A table or text on standard output; brackets in a text mean nothing."""
    Console(highlight=False).print(Text(value) if isinstance(value, str) else value)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


@contextmanager
def progress_bar(begin: str = "reading") -> Iterator[Update]:
    """A bar with the time left on standard error; nothing where that is not a terminal.

    Args:
        begin: what is being done until the first update says more.
    """
    console = Console(stderr=True)
    if is_quiet() or not console.is_terminal:
        yield lambda done, total, what: None
        return
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<24.24}", markup=False),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(begin, total=None)  # it pulses until something can be counted
        seen: tuple[int, int | None] = (0, None)

        def update(done: int, total: int, what: str) -> None:
            nonlocal seen
            if done < seen[0] or total != seen[1]:  # something else began: its time is its own
                bar.reset(task, total=total or None)
            bar.update(task, completed=done, description=what)
            seen = (done, total)

        yield update
