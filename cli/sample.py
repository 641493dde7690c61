"""`tensorllm sample`."""

from tensorllm.requests.others import SampleRequest
from tensorllm_cli.show import print_json, print_result, progress_bar
from tensorllm_cli.signature import takes


@takes(SampleRequest)
def sample(request: SampleRequest, *, json: bool) -> None:
    """Let a model write text: to distill on, to add to a short calibration set, or in its place.

    Examples:

      tensorllm sample --model my-llama/ --sequences 96 --out sampled.jsonl

      tensorllm compress --model my-llama/ --mode activation-hybrid
          --target-ratio 1.5 --calibration my.txt
          --distill-steps 96 --distill-text sampled.jsonl --out o/
    """
    with progress_bar("loading") as progress:
        from tensorllm.commands.sample import sample

        done = sample(request, progress)
    if json:
        print_json(done.to_json())
    else:
        print_result(str(done))
