"""The `tensorllm` command: the list of commands, and how errors end it.

Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted.
"""

import os
import sys
from typing import Annotated

import typer
from click.exceptions import Abort

from tensorllm.errors import Incomplete, UserError
from tensorllm_cli.compress import compress
from tensorllm_cli.inspect import inspect
from tensorllm_cli.list import list_

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
app.command()(inspect)
app.command("list")(list_)


def main() -> None:
    """Run the command line; a user's mistake is one line, never a traceback."""
    # Progress bars and notices of the libraries would spoil the output, and --json.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(standalone_mode=True)
    except UserError as error:
        fail(str(error), 2)
    except Incomplete as error:
        fail(str(error), 1)
    except (KeyboardInterrupt, Abort):
        fail("interrupted; run the same command again to go on", 130)


def fail(message: str, code: int) -> None:
    """One line on standard error, and the exit code."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201
    sys.exit(code)
