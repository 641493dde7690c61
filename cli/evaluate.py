"""`tensorllm evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from tensorllm.dataset_names import check_datasets
from tensorllm.errors import UserError
from tensorllm.io import at_home
from tensorllm.requests.evaluate import EvaluateRequest
from tensorllm_cli.interrupt import INTERRUPT
from tensorllm_cli.show import print_json, print_lines, print_logged, print_result, progress_bar
from tensorllm_cli.signature import takes


@takes(EvaluateRequest)
def evaluate(
    request: EvaluateRequest,
    *,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two folders of results: what changed.")
    ] = None,
    json: bool,
) -> None:
    """Score a model on a dataset: accuracy, loss, and how sure they are.

    Examples:

      tensorllm evaluate --model demo --dataset demo

      tensorllm evaluate --model gptj --dataset fever --compressed o/ --out runs/f

      tensorllm evaluate --compare runs/before runs/after
    """
    if compare is not None:
        if request != EvaluateRequest(seed=request.seed):
            raise UserError("--compare takes two folders, and beside them --seed and --json only")
        _compare(compare, request.seed, as_json=json)
        return
    if request.model is None or request.dataset is None:
        raise UserError("give --model and --dataset, or --compare A B")
    check_datasets([request.dataset], [request.data_file], request.plugins)
    INTERRUPT.keeps(request.out, "--out")
    with progress_bar("loading") as progress:
        from tensorllm.commands.evaluate import evaluate

        done = evaluate(request, progress)
    if json:
        print_json(done.results)
        return
    from tensorllm.reporting.scores import score_tables

    print_result(score_tables(done.results))
    if request.out is not None:
        print_lines(f"written to {request.out}")
    print_logged(done.logged_to)


def _compare(folders: tuple[Path, Path], seed: int, *, as_json: bool) -> None:
    from tensorllm.evaluation.results import compare
    from tensorllm.reporting.scores import comparison_tables

    before, after = map(at_home, folders)
    changes = compare(before, after, seed=seed)
    if as_json:
        print_json(changes)
    else:
        print_result(comparison_tables(changes))
