"""`tensorllm search-ranks`."""

from pathlib import Path
from typing import Annotated

import typer

from tensorllm_cli import options, shared
from tensorllm_cli.interrupt import INTERRUPT


def search_ranks(
    model: Annotated[str, shared.MODEL],
    dataset: Annotated[
        str | None,
        typer.Option(help="`tensorllm list datasets`, or a YAML file (default: the model's)."),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="Any that says what may be varied: `tensorllm list compressors`.")
    ] = "shared-tucker",
    objective: Annotated[
        str, typer.Option(help="accuracy, loss, pareto (accuracy against ratio), or a plugin's.")
    ] = "accuracy",
    layers: Annotated[
        str | None, typer.Option(help="Candidates such as 8-27 (default: all).")
    ] = None,
    together: Annotated[int, typer.Option(help="Neighbouring layers edited at once.")] = 1,
    compose: Annotated[
        int, typer.Option(help="Edits put on top of one another, while validation gains.")
    ] = 1,
    r1: Annotated[str | None, typer.Option(help="Values of R1 (model width) to try.")] = None,
    r2: Annotated[str | None, typer.Option(help="Values of R2 (head width) to try.")] = None,
    r3: Annotated[str | None, typer.Option(help="Values of R3 (matrices) to try.")] = None,
    tied: Annotated[
        bool, typer.Option("--tied", help="R1 = heads * R2, as the authors published.")
    ] = False,
    rho: Annotated[str | None, typer.Option(help="Shares of the rank LASER keeps.")] = None,
    matrices: Annotated[
        str | None, typer.Option(help="Sets of matrices LASER edits, such as in,out,in+out.")
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(help="Values of any dimension of the mode: NAME=V1,V2 (repeatable)."),
    ] = None,
    layout: Annotated[str | None, shared.LAYOUT] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text file, for modes that are fitted to text.")
    ] = None,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Let the calibration text hold rows scored.")
    ] = False,
    max_error: Annotated[
        float | None, typer.Option(help="Largest relative error of a decomposition.")
    ] = None,
    min_ratio: Annotated[
        float | None,
        typer.Option(help="Least ratio of the matrices' parameters (default: 1; 0: any)."),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(help="How many (default: a grid of up to 100, else 100).")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="grid, tpe or nsga2 (default: by the space's size).")
    ] = None,
    guide: Annotated[
        str | None,
        typer.Option(help="gradient: try what one backward pass predicts to be best."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order, the sampler and the bootstrap.")] = 0,
    stop_level: Annotated[
        float,
        typer.Option(help="Chance of pruning the best trial early; 0: only when it has lost."),
    ] = 0.001,
    full: Annotated[bool, typer.Option("--full", help="Examine every trial to its end.")] = False,
    time_limit: Annotated[
        str | None, typer.Option(help="Begin no trial after 90s, 10m or 2h; the study goes on.")
    ] = None,
    force_best: Annotated[
        bool, typer.Option("--force-best", help="Keep the winner though it is not found better.")
    ] = False,
    study: Annotated[
        Path | None, typer.Option(help="Folder of the study; an interrupted one goes on.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="Database URL, for workers on many machines.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes on this machine, one per GPU.")] = 1,
    protocol: Annotated[str, shared.PROTOCOL] = "strict",
    data_file: Annotated[Path | None, shared.DATA_FILE] = None,
    limit: Annotated[
        int | None, typer.Option(help="Examples at most, of validation and of test.")
    ] = None,
    cache_gib: Annotated[
        float | None, typer.Option(help="Memory for activations (default: 1/4 of what is free).")
    ] = None,
    disk_cache_gib: Annotated[
        float, typer.Option(help="Disk for activations that this memory does not hold.")
    ] = 0.0,
    revision: Annotated[str | None, shared.REVISION] = None,
    dtype: Annotated[str | None, shared.DTYPE] = None,
    plugin: Annotated[list[str] | None, shared.PLUGIN] = None,
    logger: Annotated[str | None, shared.LOGGER] = None,
    log_dir: Annotated[Path | None, shared.LOG_DIR] = None,
    json: Annotated[bool, shared.JSON] = False,
) -> None:
    """Find the layer and the ranks that make a model best; chosen on validation, reported on test.

    Examples:

      tensorllm search-ranks --model demo --dataset demo --mode shared-tucker

      tensorllm search-ranks --model gptj --dataset fever --mode hybrid --trials 500 --study runs/f

      tensorllm compress --config runs/f/best.yaml
    """
    from tensorllm_cli.show import print_json, print_result, progress_bar

    if storage is None:
        INTERRUPT.keeps(study, "--study")
    else:
        INTERRUPT.leaves = lambda: "run the same command again: the database has what is finished"
    with progress_bar("loading", every=30) as progress:
        from tensorllm.commands.plugins import load_plugins
        from tensorllm.commands.search import run
        from tensorllm.lightning.loggers import metric_log
        from tensorllm.search.request import SearchRequest
        from tensorllm.search.worker import Rules

        load_plugins(plugin or ())  # they may bring the objective that is checked here
        request = SearchRequest(
            model=model,
            dataset=dataset,
            mode=mode,
            revision=revision,
            data_file=data_file,
            protocol=protocol,
            limit=limit,
            dtype=dtype,
            layers=options.layers(layers),
            r1=options.values("--r1", r1),
            r2=options.values("--r2", r2),
            r3=options.values("--r3", r3),
            rho=options.values("--rho", rho),
            matrices=options.names(matrices),
            vary=options.named_values("--vary", vary),
            tied=tied,
            together=together,
            compose=compose,
            layout=layout,
            rules=Rules(
                objective=objective,
                level=None if full else stop_level,
                max_error=max_error,
                min_ratio=min_ratio,
            ),
            sampler=sampler,
            trials=trials,
            seed=seed,
            calibration=calibration,
            allow_overlap=allow_overlap,
            force_best=force_best,
            guide=guide,
            time_limit=options.seconds("--time-limit", time_limit),
            study=study,
            storage=storage,
            workers=workers,
            cache_bytes=None if cache_gib is None else int(cache_gib * 2**30),
            disk_cache_bytes=int(disk_cache_gib * 2**30),
            plugins=plugin or (),
        )
        with metric_log(logger, log_dir, "search") as log:
            result = run(request, progress, log.trials)
            log.search(result.results)
    if json:
        print_json(result.to_json())
        return
    from tensorllm.reporting.search import search_tables

    print_result(search_tables(result.results))
    typer.echo(result.recipe)  # as it is: rich would break its lines
    if not result.keeps:
        print_result("the original stays the best: this recipe is not kept (--force-best keeps it)")
    elif study is not None:
        print_result(f"written to {study}: tensorllm compress --config {study / 'best.yaml'}")
