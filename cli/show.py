"""Printing: tables for people, JSON for machines, progress with time left."""

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
SECONDS = 30  # between two lines of progress in a log
COUNTABLE = 10_000  # steps; of more (numbers read, say) a share tells more

_results: TextIO | None = None  # standard output, while `results_alone`


@contextmanager
def results_alone() -> Iterator[None]:
    """Only what is printed here is on standard output meanwhile.

    What plugins and libraries print, and processes that they start, goes to standard error.
    """
    global _results
    own = sys.stdout
    own.flush()
    with ExitStack() as stack:
        try:
            number, error = own.fileno(), sys.stderr.fileno()
        except (AttributeError, OSError):  # a stream of Python's alone, or closed
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
    """A table or text on standard output; brackets in a text mean nothing.

    In a pipe or file no line ends in spaces, and those of a text are not broken.
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
    out.flush()  # whoever started the command may wait for this


def print_lines(text: str) -> None:
    """A text on standard output whose lines stay as they are, however long."""
    out = _results or sys.stdout
    out.write(f"{text}\n")
    out.flush()


def print_logged(folder: Path | None) -> None:
    """Where a logger wrote, if one did."""
    if folder is not None:
        print_lines(f"logged to {folder}")


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    print_lines(json.dumps(value, indent=2))


@contextmanager
def progress_bar(begin: str = "reading") -> Iterator[Update]:
    """A bar with the time left on standard error; a line now and then where that is no terminal.

    Args:
        begin: what is being done until the first update says more.
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
        TextColumn("{task.fields[timer]}", markup=False),  # asked anew whenever the bar is drawn
    )
    with Progress(*columns, console=console, transient=True) as bar:
        # It pulses until something can be counted.
        task = bar.add_task(begin, total=None, timer=timer)

        def update(done: int, total: int, what: str) -> None:
            if timer.update(done, total):
                bar.reset(task, total=total or None)
            bar.update(task, completed=done, description=what)

        yield update


def lines(every: float, clock: Callable[[], float] = time.monotonic) -> Update:
    """Progress as lines on standard error, for logs: one now and then, none of what is short."""
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
    """What a bar says of time: how long this stage takes, and how long it still will.

    The time left is that of what is undone at the mean speed of what was done here, which needs one
    step where rich wants two within half a minute: a step may take hours. What an earlier run had
    done before this one began is no part of the speed.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.first = self.done = 0
        self.total: int | None = None
        self.start = self.last = clock()

    def update(self, done: int, total: int | None) -> bool:
        """Take note of progress; whether it is that of another stage, whose time is its own."""
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
    """0:01:05."""
    return str(timedelta(seconds=max(0, round(seconds))))
