"""`tensorllm evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from tensorllm.errors import UserError
from tensorllm_cli import options, shared
from tensorllm_cli.interrupt import INTERRUPT


def evaluate(
    model: Annotated[str | None, shared.MODEL] = None,
    dataset: Annotated[str | None, shared.DATASET] = None,
    data_file: Annotated[Path | None, shared.DATA_FILE] = None,
    compressed: Annotated[
        Path | None, typer.Option(help="What tensorllm made of the model: before and after.")
    ] = None,
    protocol: Annotated[str, shared.PROTOCOL] = "strict",
    split: Annotated[str, typer.Option(help="test, val (the first 20 %) or all.")] = "test",
    limit: Annotated[int | None, shared.LIMIT] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results; an interrupted run goes on from it.")
    ] = None,
    overwrite: Annotated[bool, shared.OVERWRITE] = False,
    revision: Annotated[str | None, shared.REVISION] = None,
    dtype: Annotated[str | None, shared.DTYPE] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens per batch; halved where memory runs out.")
    ] = None,
    accelerator: Annotated[str, typer.Option(help="cpu, gpu, ... or auto.")] = "auto",
    devices: Annotated[
        str, typer.Option(help="How many devices, or which: 2 or 0,1. On a CPU: processes.")
    ] = "1",
    num_nodes: Annotated[int, typer.Option(help="Machines.")] = 1,
    strategy: Annotated[str, typer.Option(help="Lightning's: auto, ddp, ...")] = "auto",
    precision: Annotated[
        str | None, typer.Option(help="Lightning's: 32-true, bf16-true, 16-mixed, ...")
    ] = None,
    trainer: Annotated[
        list[str] | None,
        typer.Option(help="Any other option of Lightning's Trainer: key=value; may be repeated."),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two folders of results: what changed.")
    ] = None,
    plugin: Annotated[list[str] | None, shared.PLUGIN] = None,
    logger: Annotated[str | None, shared.LOGGER] = None,
    log_dir: Annotated[Path | None, shared.LOG_DIR] = None,
    verify: Annotated[bool, shared.VERIFY] = False,
    json: Annotated[bool, shared.JSON] = False,
) -> None:
    """Score a model on a dataset: accuracy, loss, and how sure they are.

    Examples:

      tensorllm evaluate --model demo --dataset demo

      tensorllm evaluate --model gptj --dataset fever --compressed out/ --out runs/fever

      tensorllm evaluate --compare runs/before runs/after
    """
    from tensorllm_cli.show import print_json, print_result, progress_bar

    if compare is not None:
        _compare(compare, seed, as_json=json)
        return
    if model is None or dataset is None:
        raise UserError("give --model and --dataset, or --compare A B")
    INTERRUPT.keeps(out, "--out")
    with progress_bar("loading") as progress:
        from tensorllm.commands.evaluate import EvaluateRequest, evaluate
        from tensorllm.lightning.trainer import Devices

        request = EvaluateRequest(
            model=model,
            dataset=dataset,
            data_file=data_file,
            compressed=compressed,
            revision=revision,
            verify=verify,
            protocol=protocol,
            split=split,  # type: ignore[arg-type]  # checked by the dataset
            limit=limit,
            out=out,
            overwrite=overwrite,
            dtype=dtype,
            seed=seed,
            batch_tokens=batch_tokens,
            devices=Devices(
                accelerator=accelerator,
                devices=devices,
                num_nodes=num_nodes,
                strategy=strategy,
                precision=precision,
            ),
            trainer=options.assignments(trainer, option="--trainer"),
            logger=logger,
            log_dir=log_dir,
            plugins=plugin or (),
        )
        done = evaluate(request, progress)
    if json:
        print_json(done.results)
    else:
        from tensorllm.reporting.scores import score_tables

        print_result(score_tables(done.results))
        if out is not None:
            print_result(f"written to {out}")


def _compare(folders: tuple[Path, Path], seed: int, *, as_json: bool) -> None:
    from tensorllm.evaluation.results import compare
    from tensorllm.reporting.scores import comparison_tables
    from tensorllm_cli.show import print_json, print_result

    changes = compare(*folders, seed=seed)
    if as_json:
        print_json(changes)
    else:
        print_result(comparison_tables(changes))
