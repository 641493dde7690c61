"""`tensorllm generate`."""

from tensorllm.requests.others import GenerateRequest
from tensorllm_cli.show import print_json, print_lines, progress_bar
from tensorllm_cli.signature import takes


@takes(GenerateRequest)
def generate(request: GenerateRequest, *, json: bool) -> None:
    """Let a model write. A factored folder runs in its factors.

    Example:

      tensorllm generate --model out/ --prompt "Once upon a time"
    """
    with progress_bar("loading") as progress:
        from tensorllm.commands.generate import generate

        texts = generate(request, progress)
    if json:
        pairs = zip(request.prompts, texts, strict=True)
        print_json([{"prompt": prompt, "text": text} for prompt, text in pairs])
        return
    for text in texts:
        print_lines(text)
