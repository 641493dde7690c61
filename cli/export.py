"""`tensorllm export`."""

from pathlib import Path
from typing import Annotated

import typer

from tensorllm.errors import UserError
from tensorllm_cli import shared
from tensorllm_cli.interrupt import INTERRUPT


def export(
    folder: Annotated[Path, typer.Argument(help="A factored folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    format: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="dense (the default): an ordinary checkpoint."),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Stay factored, with factors in int8 or int4."),
    ] = None,
    dtype: Annotated[str | None, shared.DTYPE] = None,
    overwrite: Annotated[bool, shared.OVERWRITE] = False,
    plugin: Annotated[list[str] | None, shared.PLUGIN] = None,
    json: Annotated[bool, shared.JSON] = False,
) -> None:
    """Write a factored folder as an ordinary checkpoint, for vLLM, llama.cpp and the others.

    Examples:

      tensorllm export out/ dense/ --format dense

      tensorllm export out/ small/ --quantize int8
    """
    from tensorllm_cli.show import print_json, print_result, progress_bar

    INTERRUPT.keeps(out, "OUT")
    with progress_bar():
        from tensorllm.commands.plugins import load_plugins

        load_plugins(plugin or ())
    if quantize is not None:
        if format is not None or dtype is not None:
            raise UserError("--quantize stays factored: give it without --format and --dtype")
        _quantise(folder, out, quantize, overwrite=overwrite, as_json=json)
        return
    format = format or "dense"
    with progress_bar() as progress:
        from tensorllm.checkpoint.loader import dtype_of
        from tensorllm.compression.export import export as run

        size = run(
            folder,
            out,
            format=format,
            dtype=dtype_of(dtype),
            overwrite=overwrite,
            progress=progress,
        )
    if json:
        print_json({"out": str(out), "format": format, "bytes": size})
        return
    print_result(f"{out}: {size / 2**20:.1f} MiB of weights, dense")


def _quantise(folder: Path, out: Path, how: str, *, overwrite: bool, as_json: bool) -> None:
    from dataclasses import asdict

    from tensorllm_cli.show import print_json, print_result, progress_bar

    with progress_bar() as progress:
        from tensorllm.compression.export import quantise_folder

        sites = quantise_folder(folder, out, how, overwrite=overwrite, progress=progress)
    if as_json:
        print_json({"out": str(out), "sites": [asdict(site) for site in sites]})
        return
    before, after = (sum(getattr(s, f"bytes_{w}") for s in sites) for w in ("before", "after"))
    worst = max(site.relative_error for site in sites)
    print_result(
        f"{out}: factors {before / 2**20:.2f} MiB before, {after / 2**20:.2f} MiB as {how}; "
        f"error of the weights up to {100 * worst:.2f} %"
    )
