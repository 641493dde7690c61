"""`tensorllm reproduce`."""

from pathlib import Path
from typing import Annotated

import typer

from tensorllm_cli import options, shared
from tensorllm_cli.interrupt import INTERRUPT


def reproduce(
    model: Annotated[str, typer.Option(help="gptj, llama2 or roberta.")],
    dataset: Annotated[
        str | None, typer.Option(help="Some of the datasets, with commas (default: all four).")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Local folder of the weights, or of copies from the hub, or its cache."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with <dataset>.jsonl, or copies from the hub, or its cache."),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(help="Layer for the cells whose layer was never published; else searched."),
    ] = None,
    limit: Annotated[int | None, shared.LIMIT] = None,
    dtype: Annotated[str | None, shared.DTYPE] = None,
    device: Annotated[str, shared.DEVICE] = "auto",
    out: Annotated[
        Path, typer.Option(help="Folder that keeps each finished cell; these are not run again.")
    ] = Path("reproduction"),
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Run each cell on a tiny model; print what the real ones take."
        ),
    ] = False,
    json: Annotated[bool, shared.JSON] = False,
) -> None:
    """Run the published experiments, and print what is measured beside what was published.

    Examples:

      tensorllm reproduce --model gptj --dry-run

      tensorllm reproduce --model gptj --dataset fever,wikidata_qa --out reproduction/
    """
    from tensorllm.checkpoint.loader import device_of
    from tensorllm.commands.reproduce import ReproduceRequest, rehearse
    from tensorllm.commands.reproduce import reproduce as run
    from tensorllm.reporting.reproduction import rehearsal_table, reproduction_tables
    from tensorllm_cli.show import print_json, print_result, progress_bar

    request = ReproduceRequest(
        model=model,
        weights=weights,
        datasets=options.names(dataset),
        data=data,
        layer=layer,
        limit=limit,
        dtype=dtype,
        device=device_of(device),
        out=out,
    )
    if dry_run:
        plan = rehearse(request).to_json()
        if json:
            print_json(plan)
        else:
            print_result(rehearsal_table(plan))
        return
    INTERRUPT.keeps(out, "--out")
    with progress_bar() as progress:
        rows = [outcome.to_json() for outcome in run(request, progress)]
    if json:
        print_json(rows)
    else:
        print_result(reproduction_tables(rows))
