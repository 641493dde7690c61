"""`tensorllm search-ranks`."""

from tensorllm.dataset_names import check_datasets
from tensorllm.requests.search import SearchRequest
from tensorllm_cli.interrupt import INTERRUPT
from tensorllm_cli.show import print_json, print_lines, print_logged, print_result, progress_bar
from tensorllm_cli.signature import takes


@takes(SearchRequest)
def search_ranks(request: SearchRequest, *, json: bool) -> None:
    """Find the layer and the ranks that make a model best; chosen on validation, reported on test.

    Examples:

      tensorllm search-ranks --model demo --dataset demo --mode shared-tucker

      tensorllm search-ranks --model gptj --dataset fever --mode laser --study r/

      tensorllm compress --config r/best.yaml
    """
    names, files = (str(given or "").split(",") for given in (request.dataset, request.data_file))
    files = files if len(names) > 1 else [str(request.data_file or "")]
    check_datasets(names, files, request.plugins)
    if request.storage is None:
        INTERRUPT.keeps(request.study, "--study")
    else:
        INTERRUPT.leaves = lambda: "run the same command again: the database has what is finished"
    with progress_bar("loading") as progress:
        from tensorllm.commands.search import run

        result = run(request, progress)
    if json:
        print_json(result.to_json())
        return
    from tensorllm.reporting.search import search_tables

    print_result(search_tables(result.results))
    print_lines(result.recipe)
    if not result.keeps:
        print_result("the original stays the best: this recipe is not kept (--force-best keeps it)")
    elif request.study is not None:
        best = request.study / "best.yaml"
        print_lines(f"written to {request.study}: tensorllm compress --config {best}")
    print_logged(result.logged_to)
