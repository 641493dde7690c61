"""`tensorllm push`."""

from tensorllm.requests.others import PushRequest
from tensorllm_cli.interrupt import INTERRUPT
from tensorllm_cli.show import print_json, print_result, progress_bar
from tensorllm_cli.signature import takes


@takes(PushRequest)
def push(request: PushRequest, *, json: bool) -> None:
    """Put a folder that tensorllm wrote on the Hugging Face hub, checked first, in one commit.

    Example:

      tensorllm push out/ my-name/my-model
    """
    INTERRUPT.leaves = lambda: "the commit was not made"
    with progress_bar("uploading"):
        from tensorllm.commands.push import push

        done = push(request)
    if json:
        print_json(done.to_json())
    else:
        print_result(str(done))
