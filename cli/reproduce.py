"""`tensorllm reproduce`."""

from tensorllm.requests.reproduce import ReproduceRequest
from tensorllm_cli.interrupt import INTERRUPT
from tensorllm_cli.show import print_json, print_result, progress_bar
from tensorllm_cli.signature import takes


@takes(ReproduceRequest)
def reproduce(request: ReproduceRequest, *, json: bool) -> None:
    """Run the published experiments, and print what is measured beside what was published.

    Examples:

      tensorllm reproduce --model gptj --dry-run

      tensorllm reproduce --model gptj --dataset fever,wikidata_qa --out reproduction/
    """
    if request.dry_run:
        _rehearse(request, as_json=json)
        return
    INTERRUPT.keeps(request.out, "--out")
    with progress_bar() as progress:
        from tensorllm.commands.reproduce import reproduce

        rows = [outcome.to_json() for outcome in reproduce(request, progress)]
    if json:
        print_json(rows)
        return
    from tensorllm.reporting.reproduction import reproduction_tables

    print_result(reproduction_tables(rows))


def _rehearse(request: ReproduceRequest, *, as_json: bool) -> None:
    from tensorllm.commands.reproduce import rehearse
    from tensorllm.reporting.reproduction import rehearsal_table

    plan = rehearse(request).to_json()
    if as_json:
        print_json(plan)
    else:
        print_result(rehearsal_table(plan))
