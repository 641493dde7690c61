"""`tensorllm bench`."""

from tensorllm.requests.others import BenchRequest
from tensorllm_cli.show import print_json, print_result, progress_bar
from tensorllm_cli.signature import takes


@takes(BenchRequest)
def bench(request: BenchRequest, *, json: bool) -> None:
    """Speed and memory of a factored folder, beside the dense model that it stands for.

    Example:

      tensorllm bench --model out/ --prompt-tokens 512
    """
    with progress_bar("measuring") as progress:
        from tensorllm.commands.bench import bench

        found = bench(request, progress)
    if json:
        print_json(found.to_json())
        return
    from tensorllm.reporting.bench import bench_table

    print_result(bench_table(found.to_json()))
