"""`tensorllm reproduce`."""

from tensorllm.dataset_names import check_datasets
from tensorllm.requests.reproduce import ReproduceRequest
from tensorllm_cli.interrupt import INTERRUPT
from tensorllm_cli.show import print_json, print_result, progress_bar
from tensorllm_cli.signature import takes


@takes(ReproduceRequest)
def reproduce(request: ReproduceRequest, *, json: bool) -> None:
    """Run the published experiments beside what was published, or the study of the claim itself.

    --study claims chooses edits of any causal model on drawn rows of each
    dataset, and tells each once on other rows: better, no better, not known.

    Examples:

      tensorllm reproduce --model gptj --dry-run

      tensorllm reproduce --model gptj --dataset fever,wikidata_qa --out runs/r

      tensorllm reproduce --study claims
    """
    check_datasets(request.datasets or ())  # their rows are found in --data
    if request.dry_run:
        _rehearse(request, as_json=json)
        return
    INTERRUPT.keeps(request.out, "--out")
    if request.study == "claims":
        _claims(request, as_json=json)
        return
    with progress_bar() as progress:
        from tensorllm.commands.reproduce import reproduce

        rows = [outcome.to_json() for outcome in reproduce(request, progress)]
    if json:
        print_json(rows)
        return
    from tensorllm.reporting.reproduction import reproduction_tables

    print_result(reproduction_tables(rows))


def _claims(request: ReproduceRequest, *, as_json: bool) -> None:
    with progress_bar() as progress:
        from tensorllm.commands.claims import claims

        found = claims(request, progress)
    if as_json:
        print_json(found)
        return
    from tensorllm.reporting.claims import claims_tables

    print_result(claims_tables(found))


def _rehearse(request: ReproduceRequest, *, as_json: bool) -> None:
    with progress_bar() as progress:
        from tensorllm.commands.reproduce import rehearse
        from tensorllm.reporting.reproduction import rehearsal_table

        plan = rehearse(request, progress).to_json()
    if as_json:
        print_json(plan)
    else:
        print_result(rehearsal_table(plan))
