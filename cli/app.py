"""The `tensorllm` command: the list of commands, and how errors end it."""

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


# Typer carries its own copy of click since 0.26 and names none of its errors but this one, whose
# last ancestors before Exception are those of every wrong use.
WRONG_USE: type[Exception] = typer.BadParameter.__mro__[
    typer.BadParameter.__mro__.index(Exception) - 1
]
INTERRUPTED = 130
# New ones after which Python looks for cycles, 700 by itself: imports make nearly a million, which
# all stay, and looking among them again and again takes a tenth of a command's start.
OBJECTS = 20_000
# Packages that the base installation leaves out, and the extras that bring them.
EXTRAS = {
    "optuna": "search",
    "psycopg": "postgres",
    "matplotlib": "report",
    "jinja2": "report",
    "lm_eval": "lm-eval",
    "torchao": "quant",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake is one line, never a traceback."""
    INTERRUPT.listen()
    volume.normal()
    if arguments is None:  # this process is ours
        gc.set_threshold(OBJECTS)
        volume.silence_libraries()
        arguments = sys.argv[1:]
    for stream in (sys.stdout, sys.stderr):  # a name that is no text must not end the program
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(list(arguments) or ["--help"], standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has gone, such as `head`
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
    """What is said of an error, and the exit code; what is not an error goes on as it is."""
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, WRONG_USE):
        return _wrong_use(error), 2
    if isinstance(error, (Incomplete, OSError)):  # an OSError's text names the file
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
    """Typer's words, and what was typed; of what is missing also what it would have been."""
    from pydantic import ValidationError

    said: str = error.format_message().removeprefix("Invalid value: ")
    if said.startswith("Got unexpected extra argument"):
        return f"{said}: a value stands behind its option, and a list is one word, such as 0,1,2"
    if isinstance(error.__cause__, ValidationError):  # its words name no value
        said = f"{said}, got {error.__cause__.errors()[0]['input']!r}"
    takes = (
        getattr(getattr(error, "param", None), "help", None)
        if said.startswith("Missing ")
        else None
    )
    return f"{said.rstrip('.')}: {takes}" if takes else said


def stop() -> NoReturn:
    """The end after Ctrl-C; pressing it again changes nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Where Ctrl-C came inside code that was a string (each dataclass runs some), Python remembers
    # that until the next such code, and `python -m` would end by the signal, not by our exit code.
    exec("")
    fail(f"interrupted; {INTERRUPT.leaves()}", INTERRUPTED)


def fail(message: str, code: int) -> NoReturn:
    """One line on standard error, broken between words where that is a terminal; the exit code."""
    line = f"error: {' '.join(message.split())}"
    if sys.stderr.isatty():
        width = get_terminal_size().columns
        line = textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
    print(line, file=sys.stderr)  # noqa: T201
    sys.exit(code)
