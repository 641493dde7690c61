"""`tensorllm bench`."""

from pathlib import Path
from typing import Annotated

import typer

from tensorllm_cli import shared


def bench(
    model: Annotated[Path, typer.Option(help="A factored folder.")],
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Of the prompt (default: 512, or what the model takes).")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(help="Decoded behind it (default: 32, or what the model takes).")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Turns; the median counts.")] = 5,
    policy: Annotated[str, shared.POLICY] = "always",
    dtype: Annotated[str | None, shared.DTYPE] = None,
    device: Annotated[str, shared.DEVICE] = "cpu",
    plugin: Annotated[list[str] | None, shared.PLUGIN] = None,
    json: Annotated[bool, shared.JSON] = False,
) -> None:
    """Speed and memory of a factored folder, beside the dense model that it stands for.

    Example:

      tensorllm bench --model out/ --prompt-tokens 512
    """
    from tensorllm_cli.show import print_json, print_result, progress_bar

    with progress_bar("measuring"):
        from tensorllm.commands.bench import BenchRequest
        from tensorllm.commands.bench import bench as run

        request = BenchRequest(
            model=model,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
            policy=policy,  # type: ignore[arg-type]  # checked there
            dtype=dtype,
            device=device,
            plugins=tuple(plugin or ()),
        )
        found = run(request)
    if json:
        print_json(found.to_json())
        return
    from tensorllm.reporting.bench import bench_table

    print_result(bench_table(found.to_json()))
