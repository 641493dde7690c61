"""Output: tables for people, JSON for programs, and progress with the time left."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.text import Text

from tensorllm_cli.volume import is_quiet

Update = Callable[[int, int, str], None]
SECONDS = 30  # between lines of progress in a log
COUNTABLE = 10_000  # steps; above (such as numbers read) the share is shown instead

_results: TextIO | None = None  # standard output, while `results_alone`


@contextmanager
def results_alone() -> Iterator[None]:
    """Within the block, only what this module prints goes to standard output.

    Output of plugins, libraries and child processes goes to standard error.
    """
    global _results
    own = sys.stdout
    own.flush()
    with ExitStack() as stack:
        try:
            number, error = own.fileno(), sys.stderr.fileno()
        except (AttributeError, OSError):  # a stream without a file descriptor, or closed
            _results = own
        else:
            _results = stack.enter_context(
                os.fdopen(os.dup(number), "w", encoding=own.encoding, errors=own.errors)
            )
            stack.callback(os.dup2, _results.fileno(), number)
            os.dup2(error, number)
        stack.enter_context(redirect_stdout(sys.stderr))
        try:
            yield
        finally:
            _results = None


def print_result(value: RenderableType) -> None:
    """Print a table or text to standard output, without markup in texts.

    In a pipe or file, lines have no trailing spaces and texts are not wrapped.
    """
    out = _results or sys.stdout
    console = Console(file=out, highlight=False)
    if console.is_terminal:
        console.print(Text(value) if isinstance(value, str) else value)
    elif isinstance(value, str):
        out.write(f"{value}\n")
    else:
        with console.capture() as printed:
            console.print(value)
        out.writelines(f"{line.rstrip()}\n" for line in printed.get().splitlines())
    out.flush()  # a parent process may wait for this


def print_lines(text: str) -> None:
    """Print a text to standard output without wrapping its lines."""
    out = _results or sys.stdout
    out.write(f"{text}\n")
    out.flush()


def print_logged(folder: Path | None) -> None:
    """Where a logger wrote, if one did."""
    if folder is not None:
        print_lines(f"logged to {folder}")


def print_json(value: Any) -> None:
    """Print one JSON document to standard output."""
    print_lines(json.dumps(value, indent=2))


@contextmanager
def progress_bar(begin: str = "reading") -> Iterator[Update]:
    """A bar with the time left on standard error; occasional lines if that is not a terminal.

    Args:
        begin: what is being done until the first update.
    """
    console = Console(stderr=True)
    if is_quiet():
        yield lambda done, total, what: None
        return
    if not console.is_terminal:
        yield lines(SECONDS)
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    timer = Timer()
    columns = (
        TextColumn("{task.description:<24.24}", markup=False),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        TextColumn("{task.fields[timer]}", markup=False),  # evaluated whenever the bar is drawn
    )
    with Progress(*columns, console=console, transient=True) as bar:
        # Without a total it pulses.
        task = bar.add_task(begin, total=None, timer=timer)

        def update(done: int, total: int, what: str) -> None:
            if timer.update(done, total):
                bar.reset(task, total=total or None)
            bar.update(task, completed=done, description=what)

        yield update


def lines(every: float, clock: Callable[[], float] = time.monotonic) -> Update:
    """Progress as occasional lines on standard error, for logs; none for short work."""
    timer, last = Timer(clock), clock()

    def update(done: int, total: int, what: str) -> None:
        nonlocal last
        timer.update(done, total)
        if clock() - last >= every:
            last = clock()
            part = f"{done} of {total}" if total < COUNTABLE else f"{100 * done / total:.0f} %"
            sys.stderr.write(f"{part}, {what}, {timer}\n")
            sys.stderr.flush()

    return update


class Timer:
    """The time passed and the time left of a stage, as text.

    The time left is extrapolated from the mean speed so far. That needs one step, where rich needs
    two within half a minute, although a step may take hours. Work that an earlier run finished does
    not count towards the speed.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.first = self.done = 0
        self.total: int | None = None
        self.start = self.last = clock()

    def update(self, done: int, total: int | None) -> bool:
        """Record progress; returns whether it is that of a new stage, which is timed separately."""
        another = done < self.done or total != self.total
        if another:
            self.first, self.done, self.total = done, done, total
            self.start = self.last = self.clock()
        elif done > self.done:
            self.done, self.last = done, self.clock()
        return another

    def __str__(self) -> str:
        now = self.clock()
        passed = _clock_time(now - self.start)
        if self.done == self.first or not self.total:
            return passed
        each = (self.last - self.start) / (self.done - self.first)
        left = each * (self.total - self.done) - (now - self.last)
        return f"{passed}, {_clock_time(left)} left"


def _clock_time(seconds: float) -> str:
    """A time such as 0:01:05."""
    return str(timedelta(seconds=max(0, round(seconds))))
