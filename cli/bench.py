"""`tensorllm bench`."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def bench(
    model: Annotated[Path, typer.Option(help="A factored folder.")],
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded behind it.")] = 32,
    repeats: Annotated[int, typer.Option(help="Turns; the median counts.")] = 5,
    policy: Annotated[
        Literal["auto", "always"],
        typer.Option(help="Factored layers: always, or auto: those that gain by it."),
    ] = "always",
    dtype: Annotated[
        str | None, typer.Option(help="Weights as fp32, bf16 or fp16; default: as stored.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Speed and memory of a factored folder, beside the dense model that it stands for.

    Example:

      tensorllm bench --model out/ --prompt-tokens 512
    """
    from tensorllm.pipeline.bench import BenchRequest
    from tensorllm.pipeline.bench import bench as run
    from tensorllm_cli.show import print_json, print_result

    found = run(
        BenchRequest(
            model=model,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
            policy=policy,
            dtype=dtype,
            device=device,
        )
    )
    if json:
        print_json(found.to_json())
        return
    from tensorllm.reporting.bench import bench_table

    print_result(bench_table(found.to_json()))
