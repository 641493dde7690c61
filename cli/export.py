"""`tensorllm export`."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def export(
    folder: Annotated[Path, typer.Argument(help="A factored folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    format: Annotated[
        Literal["dense"], typer.Option(help="dense: an ordinary checkpoint, for every tool.")
    ] = "dense",
    dtype: Annotated[
        str | None, typer.Option(help="Weights as fp32, bf16 or fp16; default: as the original.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder.")] = False,
) -> None:
    """Write a factored folder as an ordinary checkpoint, for vLLM, llama.cpp and the others.

    Example:

      tensorllm export out/ dense/ --format dense
    """
    from tensorllm.pipeline.export import export as run
    from tensorllm.pipeline.models import dtype_of
    from tensorllm_cli.show import print_result

    size = run(folder, out, format=format, dtype=dtype_of(dtype), overwrite=overwrite)
    print_result(f"{out}: {size / 2**20:.1f} MiB of weights, dense")
