"""`tensorllm inspect`."""

from tensorllm.requests.others import InspectRequest
from tensorllm_cli.show import print_json, print_result, progress_bar
from tensorllm_cli.signature import takes


@takes(InspectRequest)
def inspect(request: InspectRequest, *, json: bool) -> None:
    """Show the spectra of the attention, layer by layer and mode by mode, and what ranks keep.

    Examples:

      tensorllm inspect --model demo

      tensorllm inspect --model my-llama/ --layers 20-27 --energy 0.8,0.95
    """
    with progress_bar() as progress:
        from tensorllm.commands.inspect import inspect

        found = inspect(request, progress)
    if json:
        print_json([layer.to_json() for layer in found])
        return
    from tensorllm.reporting.spectra import spectra_tables

    print_result(spectra_tables(found))
