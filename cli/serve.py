"""`tensorllm serve`."""

from typing import TYPE_CHECKING

from tensorllm.requests.others import ServeRequest
from tensorllm_cli.interrupt import INTERRUPT
from tensorllm_cli.show import print_json, print_lines, progress_bar
from tensorllm_cli.signature import takes

if TYPE_CHECKING:
    from tensorllm.commands.serve import Address


@takes(ServeRequest)
def serve(request: ServeRequest, *, json: bool) -> None:
    """Serve any folder, a factored one in its factors, to OpenAI's clients, until Ctrl-C.

    Example:

      tensorllm serve --model out/ --port 8000
    """
    INTERRUPT.leaves = lambda: "the server has stopped"
    with progress_bar("loading"):
        from tensorllm.commands.serve import serve

    def announce(address: "Address") -> None:
        if json:
            print_json(address.to_json())
        else:
            print_lines(str(address))

    serve(request, announce)
