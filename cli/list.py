"""`tensorllm list`."""

from enum import StrEnum
from typing import Annotated

import typer


class Kind(StrEnum):
    """What can be listed."""

    COMPRESSORS = "compressors"
    ARCHITECTURES = "architectures"
    MODELS = "models"
    DATASETS = "datasets"
    RECIPES = "recipes"


def list_(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    plugin: Annotated[
        list[str] | None, typer.Option(help="Module to import first, with entries of yours.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List what tensorllm knows: compressors, architectures, models, datasets or recipes.

    Examples:

      tensorllm list compressors

      tensorllm list recipes --json
    """
    from tensorllm.pipeline.catalog import catalog
    from tensorllm_cli.show import print_json, print_result

    rows = catalog(kind.value, plugin or ())
    if json:
        print_json(rows)
        return
    from tensorllm.reporting.tables import rows_table

    print_result(rows_table(rows))
