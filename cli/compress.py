"""`tensorllm compress`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tensorllm_cli import options, shared
from tensorllm_cli.interrupt import INTERRUPT


def compress(
    model: Annotated[str | None, shared.MODEL] = None,
    mode: Annotated[str | None, shared.MODE] = None,
    config: Annotated[Path | None, typer.Option(help="A recipe (YAML) instead of --mode.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Take the shipped recipe for this dataset.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Such as 27, 0,1, 8-27 or all (default: recipe, else all).")
    ] = None,
    ranks: Annotated[
        str | None, typer.Option(help="Tucker ranks R1,R2,R3 of width, head_dim, matrices.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="Instead of ranks: energy to keep per mode, in (0, 1].")
    ] = None,
    error: Annotated[
        float | None, typer.Option(help="Instead of ranks: relative error allowed, in [0, 1).")
    ] = None,
    rho: Annotated[
        float | None, typer.Option(help="LASER: share of the full rank to keep, in (0, 1].")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="LASER, TRAWL: the rank itself.")] = None,
    matrices: Annotated[
        str | None, typer.Option(help="Which of q,k,v,o,in,gate,out, where the mode asks.")
    ] = None,
    layout: Annotated[str | None, shared.LAYOUT] = None,
    target_ratio: Annotated[
        float | None,
        typer.Option(help="Instead: how much smaller, over 1; spread over layers."),
    ] = None,
    target_params: Annotated[
        int | None, typer.Option(help="Instead: parameters that the whole model may keep.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Modes that use data: a text file to fit to.")
    ] = None,
    max_loss_increase: Annotated[
        float | None,
        typer.Option(help="With --calibration, instead: nats per token the loss may rise there."),
    ] = None,
    distill_steps: Annotated[
        int | None, typer.Option(help="With --calibration: steps to train the factors afterwards.")
    ] = None,
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Calibrate layer by layer from disk: too big for memory."),
    ] = False,
    allow_overlap: Annotated[
        bool,
        typer.Option("--allow-overlap", help="Let --evaluate score rows of the calibration text."),
    ] = False,
    sequences: Annotated[int, typer.Option(help="Calibration sequences to draw.")] = 128,
    seed: Annotated[int, typer.Option(help="Of that draw.")] = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any other field of the mode: field=value.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write the checkpoint to.")] = None,
    format: Annotated[
        str, typer.Option(help="dense (loads anywhere) or factored (small on disk).")
    ] = "dense",
    dtype: Annotated[str | None, shared.DTYPE] = None,
    device: Annotated[str, shared.DEVICE] = "auto",
    overwrite: Annotated[bool, shared.OVERWRITE] = False,
    evaluate: Annotated[
        str | None, typer.Option(help="Score on this dataset before and after.")
    ] = None,
    data_file: Annotated[Path | None, shared.DATA_FILE] = None,
    limit: Annotated[int | None, shared.LIMIT] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and its cost; do nothing.")
    ] = False,
    revision: Annotated[str | None, shared.REVISION] = None,
    plugin: Annotated[list[str] | None, shared.PLUGIN] = None,
    logger: Annotated[str | None, shared.LOGGER] = None,
    log_dir: Annotated[Path | None, shared.LOG_DIR] = None,
    json: Annotated[bool, shared.JSON] = False,
) -> None:
    r"""Compress a model; without --out, in memory, to see what it does.

    Examples:

      tensorllm compress --model demo --mode hybrid

      tensorllm compress --model llama/ --mode shared-tucker --ranks 1920,60,3 --out o/

      tensorllm compress --model llama/ --mode activation-tucker --target-ratio 1.5 \
          --calibration stories.txt --out o/

      tensorllm compress --model gptj --mode hybrid --out out/ --format factored
    """
    from tensorllm_cli.show import print_json, print_result, progress_bar

    given: dict[str, Any] = {
        "ranks": options.ranks(ranks),
        "energy": energy,
        "error": error,
        "rho": rho,
        "rank": rank,
        "matrices": options.names(matrices),
        "layout": layout,
        "target_ratio": target_ratio,
        "target_params": target_params,
        "max_loss_increase": max_loss_increase,
        "distill_steps": distill_steps,
    }
    INTERRUPT.keeps(out, "--out")
    with progress_bar("loading") as progress:
        from tensorllm.commands.compress import CompressRequest, run
        from tensorllm.evaluation.evaluate import dataset_scorer
        from tensorllm.lightning.loggers import metric_log

        request = CompressRequest(
            model=model,
            revision=revision,
            mode=mode,
            config=config,
            dataset=dataset,
            layers=options.layers(layers),
            all_layers=layers == "all",
            settings={key: value for key, value in given.items() if value is not None}
            | options.assignments(settings),
            out=out,
            format=format,
            dtype=dtype,
            device=device,
            overwrite=overwrite,
            dry_run=dry_run,
            evaluate=evaluate,
            calibration=calibration,
            sequences=sequences,
            seed=seed,
            stream=stream,
            data_file=data_file,
            allow_overlap=allow_overlap,
            plugins=plugin or (),
        )
        with metric_log(logger, log_dir, "compress") as log:
            result = run(request, progress, dataset_scorer(data_file, limit, progress))
            if not dry_run:
                log.compression(result.to_json())
    if json:
        print_json(result.to_json())
    else:
        from tensorllm.reporting.tables import result_tables

        print_result(result_tables(result))
        if out is not None and not dry_run:
            print_result(f"written to {out}")
