"""`tensorllm inspect`."""

from typing import Annotated

import typer

from tensorllm_cli import options, shared


def inspect(
    model: Annotated[str, shared.MODEL],
    layers: Annotated[
        str | None, typer.Option(help="Such as 27, 0,1 or 8-27 (default: all).")
    ] = None,
    energy: Annotated[
        str, typer.Option(help="Energy shares for which ranks are told.")
    ] = "0.5,0.9,0.99",
    revision: Annotated[str | None, shared.REVISION] = None,
    plugin: Annotated[list[str] | None, shared.PLUGIN] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, all singular values.")] = False,
) -> None:
    """Show the spectra of the attention, layer by layer and mode by mode, and what ranks keep.

    Examples:

      tensorllm inspect --model demo

      tensorllm inspect --model my-llama/ --layers 20-27 --energy 0.8,0.95
    """
    from tensorllm_cli.show import print_json, print_result, progress_bar

    with progress_bar() as progress:
        from tensorllm.commands.inspect import inspect as run
        from tensorllm.commands.plugins import load_plugins

        load_plugins(plugin or ())
        found = run(
            model, options.layers(layers), options.shares("--energy", energy), revision, progress
        )
    if json:
        print_json([layer.to_json() for layer in found])
        return
    from tensorllm.reporting.spectra import spectra_tables

    print_result(spectra_tables(found))
