"""`tensorllm list`."""

from tensorllm.requests.others import ListRequest
from tensorllm_cli.show import print_json, print_result, progress_bar
from tensorllm_cli.signature import takes


@takes(ListRequest)
def list_(request: ListRequest, *, json: bool) -> None:
    """List what tensorllm knows, of one kind.

    Examples:

      tensorllm list compressors

      tensorllm list recipes --json
    """
    with progress_bar():
        from tensorllm.commands.catalog import catalog
        from tensorllm.reporting.rows import rows_table

        rows = catalog(request.kind, request.plugins)
    if json:
        print_json(rows)
        return
    print_result(rows_table(rows))
