"""The `tensorllm` command: the list of commands, and how errors end it.

Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted.
"""

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Annotated, NoReturn

import typer

from tensorllm.errors import Incomplete, UserError
from tensorllm_cli.bench import bench
from tensorllm_cli.compress import compress
from tensorllm_cli.evaluate import evaluate
from tensorllm_cli.export import export
from tensorllm_cli.generate import generate
from tensorllm_cli.inspect import inspect
from tensorllm_cli.list import list_
from tensorllm_cli.reproduce import reproduce
from tensorllm_cli.search import search_ranks

app = typer.Typer(
    name="tensorllm",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("tensorllm"))
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Rewrite a transformer's weights as shared low-rank tensors: it reasons better, and shrinks.

    Begin with: tensorllm compress --model demo --mode hybrid
    """
    del version


app.command()(compress)
app.command()(evaluate)
app.command()(reproduce)
app.command()(inspect)
app.command()(generate)
app.command()(export)
app.command()(bench)
app.command("list")(list_)
app.command("search-ranks")(search_ranks)


# Typer carries its own copy of click since 0.26 and names none of its errors but this one, whose
# last ancestor before Exception is that of every wrong use.
WRONG_USE: type[Exception] = typer.BadParameter.__mro__[
    typer.BadParameter.__mro__.index(Exception) - 1
]
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake is one line, never a traceback."""
    # Progress bars and notices of the libraries would spoil the output, and --json.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):  # a name that is no text must not end the program
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(list(arguments) or ["--help"], standalone_mode=False)
    except UserError as error:
        fail(str(error), 2)
    except WRONG_USE as error:
        fail(error.format_message(), 2)  # type: ignore[attr-defined]
    except Incomplete as error:
        fail(str(error), 1)
    except BrokenPipeError:  # whoever read our output has gone, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # what is wrong is outside the program; its text names the file
        fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:  # Typer turns the first Ctrl-C into this
        fail("interrupted; run the same command again to go on", INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def fail(message: str, code: int) -> NoReturn:
    """One line on standard error, and the exit code."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201
    sys.exit(code)
