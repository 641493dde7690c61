"""`tensorllm list`."""

from typing import Annotated

import typer

from tensorllm_cli import names, shared


def list_(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            autocompletion=names.kinds,
            help="compressors, architectures, models, datasets or recipes.",
        ),
    ],
    plugin: Annotated[list[str] | None, shared.PLUGIN] = None,
    json: Annotated[bool, shared.JSON] = False,
) -> None:
    """List what tensorllm knows, of one kind.

    Examples:

      tensorllm list compressors

      tensorllm list recipes --json
    """
    from tensorllm_cli.show import print_json, print_result, progress_bar

    with progress_bar():
        from tensorllm.commands.catalog import catalog

        rows = catalog(kind, plugin or ())
    if json:
        print_json(rows)
        return
    from tensorllm.reporting.tables import rows_table

    print_result(rows_table(rows))
