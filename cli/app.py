"""The `tensorllm` command: its subcommands, and how errors are reported."""

import errno
import gc
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Sequence
from io import TextIOWrapper
from shutil import get_terminal_size
from typing import Annotated, Any, NoReturn

import typer

from tensorllm.errors import Incomplete, UserError
from tensorllm.registry import raised_by
from tensorllm_cli import volume
from tensorllm_cli.bench import bench
from tensorllm_cli.compress import compress
from tensorllm_cli.evaluate import evaluate
from tensorllm_cli.export import export
from tensorllm_cli.generate import generate
from tensorllm_cli.inspect import inspect
from tensorllm_cli.interrupt import INTERRUPT
from tensorllm_cli.list import list_
from tensorllm_cli.placeholders import Command, Group
from tensorllm_cli.push import push
from tensorllm_cli.report import report
from tensorllm_cli.reproduce import reproduce
from tensorllm_cli.sample import sample
from tensorllm_cli.search import search_ranks
from tensorllm_cli.serve import serve

EXIT_CODES = "Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted."

app = typer.Typer(
    name="tensorllm",
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("tensorllm"))
        raise typer.Exit


@app.callback()
@volume.with_volume
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Rewrite a transformer's weights as shared low-rank tensors, to denoise and to shrink it.

    Begin with: tensorllm compress --model demo --mode hybrid
    """
    del version


COMMANDS = {
    "compress": compress,
    "evaluate": evaluate,
    "search-ranks": search_ranks,
    "reproduce": reproduce,
    "inspect": inspect,
    "generate": generate,
    "sample": sample,
    "serve": serve,
    "export": export,
    "push": push,
    "bench": bench,
    "report": report,
    "list": list_,
}
for name, command in COMMANDS.items():
    app.command(name, cls=Command, epilog=EXIT_CODES)(volume.with_volume(command))


# Typer bundles its own click since 0.26 and exports only this one of its errors, whose last
# ancestor before Exception is that of all usage errors.
WRONG_USE: type[Exception] = typer.BadParameter.__mro__[
    typer.BadParameter.__mro__.index(Exception) - 1
]
INTERRUPTED = 130
# Allocations between runs of the garbage collector (700 by default): imports create nearly a
# million lasting objects, and collecting among them takes a tenth of a command's start-up time.
OBJECTS = 20_000
# Optional packages, and the extras that install them.
EXTRAS = {
    "optuna": "search",
    "psycopg": "postgres",
    "matplotlib": "report",
    "jinja2": "report",
    "lm_eval": "lm-eval",
    "torchao": "quant",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake is reported in one line, never as a traceback."""
    INTERRUPT.listen()
    volume.normal()
    if arguments is None:  # this process is ours
        gc.set_threshold(OBJECTS)
        volume.silence_libraries()
        arguments = sys.argv[1:]
    for stream in (sys.stdout, sys.stderr):  # undecodable file names must not end the program
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(list(arguments) or ["--help"], standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has gone, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except BaseException as error:
        if volume.is_verbose():
            traceback.print_exception(error)
        if INTERRUPT.pressed:
            stop()
        fail(*line_of(error))
    if code == INTERRUPTED:  # Typer turns Ctrl-C into this
        stop()
    sys.exit(code if isinstance(code, int) else 0)


def line_of(error: BaseException) -> tuple[str, int]:
    """The message for an error, and the exit code; SystemExit and the like are raised again."""
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, WRONG_USE):
        return _wrong_use(error), 2
    if getattr(error, "errno", None) == errno.ENAMETOOLONG:  # with what we put around the name
        return str(error), 2
    if isinstance(error, (Incomplete, OSError)):  # the message of an OSError names the file
        return str(error), 1
    if isinstance(error, typer.Abort):
        return "aborted", 1
    if not isinstance(error, Exception):
        raise error
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package in EXTRAS:
            return f"this needs {package}: pip install 'tensorllm[{EXTRAS[package]}]'", 2
    what = f"{type(error).__name__}: {error}".rstrip(": ")
    if plugin := raised_by(error):
        return f"the code of {plugin} raised {what}; with --verbose the traceback is printed", 1
    return f"this should not happen: {what}; with --verbose the traceback is printed", 1


def _wrong_use(error: Any) -> str:
    """Typer's message, with what was typed; for a missing value also what it means."""
    from pydantic import ValidationError

    said: str = error.format_message().removeprefix("Invalid value: ")
    if said.startswith("Got unexpected extra argument"):
        return f"{said}: a value stands behind its option, and a list is one word, such as 0,1,2"
    if isinstance(error.__cause__, ValidationError):  # its message does not name the value
        said = f"{said}, got {error.__cause__.errors()[0]['input']!r}"
    takes = (
        getattr(getattr(error, "param", None), "help", None)
        if said.startswith("Missing ")
        else None
    )
    return f"{said.rstrip('.')}: {takes}" if takes else said


def stop() -> NoReturn:
    """Exit after Ctrl-C; pressing it again has no effect."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # If Ctrl-C came during `exec` (every dataclass uses it), Python remembers that until the next
    # `exec`, and `python -m` would end by the signal instead of our exit code.
    exec("")
    fail(f"interrupted; {INTERRUPT.leaves()}", INTERRUPTED)


def fail(message: str, code: int) -> NoReturn:
    """Exit with a code and one line on standard error, wrapped at words on a terminal."""
    line = f"error: {' '.join(message.split())}"
    if sys.stderr.isatty():
        width = get_terminal_size().columns
        line = textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
    print(line, file=sys.stderr)  # noqa: T201
    sys.exit(code)
