"""`tensorllm generate`."""

from typing import Annotated, Literal

import typer

Policy = Literal["auto", "always"]


def generate(
    model: Annotated[str, typer.Option(help="Short name, local folder, or hub id.")],
    prompt: Annotated[list[str], typer.Option(help="What to go on from; may be repeated.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Share of probability to sample from.")] = 1.0,
    beams: Annotated[int, typer.Option(help="Of the beam search.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    policy: Annotated[
        Policy, typer.Option(help="Factored layers: always, or auto: those that gain by it.")
    ] = "always",
    dtype: Annotated[
        str | None, typer.Option(help="Weights as fp32, bf16 or fp16; default: as stored.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Let a model write. A factored folder runs in its factors, with a latent cache.

    Example:

      tensorllm generate --model out/ --prompt "Once upon a time"
    """
    from tensorllm.pipeline.generate import GenerateRequest
    from tensorllm.pipeline.generate import generate as run
    from tensorllm_cli.show import print_json, print_result

    texts = run(
        GenerateRequest(
            model=model,
            prompts=tuple(prompt),
            revision=revision,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            beams=beams,
            seed=seed,
            policy=policy,
            dtype=dtype,
            device=device,
        )
    )
    if json:
        print_json([{"prompt": p, "text": t} for p, t in zip(prompt, texts, strict=True)])
        return
    for text in texts:
        print_result(text)
