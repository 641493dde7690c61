"""`tensorllm export`."""

from tensorllm.requests.others import ExportRequest
from tensorllm_cli.interrupt import INTERRUPT
from tensorllm_cli.show import print_json, print_result, progress_bar
from tensorllm_cli.signature import takes


@takes(ExportRequest)
def export(request: ExportRequest, *, json: bool) -> None:
    """Write a factored folder as an ordinary checkpoint, for vLLM, llama.cpp and the others.

    Examples:

      tensorllm export out/ dense/ --format dense

      tensorllm export out/ small/ --quantize int8
    """
    INTERRUPT.keeps(request.out, "OUT")
    with progress_bar() as progress:
        from tensorllm.commands.export import run

        done = run(request, progress)
    if json:
        print_json(done.to_json())
    else:
        print_result(str(done))
