"""`tensorllm generate`."""

from typing import Annotated

import typer

from tensorllm_cli import shared


def generate(
    model: Annotated[str, shared.MODEL],
    prompt: Annotated[list[str], typer.Option(help="What to go on from; may be repeated.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Share of probability to sample from.")] = 1.0,
    beams: Annotated[int, typer.Option(help="Of the beam search.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    policy: Annotated[str, shared.POLICY] = "always",
    dtype: Annotated[str | None, shared.DTYPE] = None,
    device: Annotated[str, shared.DEVICE] = "cpu",
    revision: Annotated[str | None, shared.REVISION] = None,
    plugin: Annotated[list[str] | None, shared.PLUGIN] = None,
    verify: Annotated[bool, shared.VERIFY] = False,
    json: Annotated[bool, shared.JSON] = False,
) -> None:
    """Let a model write. A factored folder runs in its factors, with a latent cache.

    Example:

      tensorllm generate --model out/ --prompt "Once upon a time"
    """
    from tensorllm_cli.show import print_json, print_result, progress_bar

    with progress_bar("loading") as progress:
        from tensorllm.commands.generate import GenerateRequest
        from tensorllm.commands.generate import generate as run
        from tensorllm.commands.plugins import load_plugins

        load_plugins(plugin or ())
        request = GenerateRequest(
            model=model,
            prompts=tuple(prompt),
            revision=revision,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            beams=beams,
            seed=seed,
            policy=policy,  # type: ignore[arg-type]  # checked there
            dtype=dtype,
            device=device,
            verify=verify,
        )
        texts = run(request, progress)
    if json:
        print_json([{"prompt": p, "text": t} for p, t in zip(prompt, texts, strict=True)])
        return
    for text in texts:
        print_result(text)
