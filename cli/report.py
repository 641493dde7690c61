"""`tensorllm report`."""

from pathlib import Path
from typing import Annotated

import typer

from tensorllm_cli import shared


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Folders that compress, evaluate or search-ranks wrote; files of bench --json.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    card: Annotated[
        bool, typer.Option(help="Put what was measured into the checkpoints' README.md too.")
    ] = False,
    json: Annotated[bool, shared.JSON] = False,
) -> None:
    """Show runs as one web page: what was changed, what is left, and what came of it.

    Several runs of one model make one story; several models are put side by side.

    Examples:

      tensorllm report out/ runs/fever

      tensorllm report laser/ tucker/ hybrid/ runs/* --out comparison.html
    """
    from tensorllm.commands.report import report as run
    from tensorllm_cli.show import print_json, print_result

    made = run(runs, out, cards=card)
    if json:
        print_json(made.to_json())
        return
    print_result(f"written: {made.page}, and {len(made.plots)} plots in {out.stem}_plots")
    for path in made.cards:
        print_result(f"extended: {path}")
