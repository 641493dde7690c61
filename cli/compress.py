"""`tensorllm compress`."""

from tensorllm.dataset_names import check_datasets
from tensorllm.requests.compress import CompressRequest
from tensorllm_cli.interrupt import INTERRUPT
from tensorllm_cli.show import print_json, print_lines, print_logged, print_result, progress_bar
from tensorllm_cli.signature import takes


@takes(CompressRequest)
def compress(request: CompressRequest, *, json: bool) -> None:
    r"""Compress a model; without --out, in memory, to see what it does.

    Examples:

      tensorllm compress --model demo --mode hybrid

      tensorllm compress --model m/ --mode shared-tucker --ranks 960,60,3 --out o/

      tensorllm compress --model m/ --mode activation-tucker --target-ratio 1.5 \
          --calibration stories.txt --out o/

      tensorllm compress --model gptj --mode hybrid --out out/ --format factored
    """
    if request.evaluate is not None:
        check_datasets([request.evaluate], [request.data_file], request.plugins)
    INTERRUPT.keeps(request.out, "--out")
    if isinstance(request.target_ratio, tuple):
        _several(request, as_json=json)
        return
    with progress_bar("loading") as progress:
        from tensorllm.commands.compress import run

        result = run(request, progress)
    if result is None:  # another process says what was made
        return
    if json:
        print_json(result.to_json())
        return
    from tensorllm.reporting.tables import result_tables

    print_result(result_tables(result))
    if request.out is not None and not request.dry_run:
        print_lines(f"written to {request.out}")
    print_logged(result.logged_to)


def _several(request: CompressRequest, *, as_json: bool) -> None:
    with progress_bar("loading") as progress:
        from tensorllm.commands.compress import run_sizes

        reports = run_sizes(request, progress)
    if as_json:
        print_json([report.to_json() for report in reports])
        return
    from tensorllm.reporting.tables import sizes_table

    print_result(sizes_table(reports))
    print_lines(f"written to folders in {request.out}")
    for report in reports:
        print_logged(report.logged_to)
