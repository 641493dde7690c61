"""`tensorllm evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from tensorllm.errors import UserError


def evaluate(
    model: Annotated[
        str | None,
        typer.Option(help="Short name (`tensorllm list models`), local folder, or hub id."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="`tensorllm list datasets`, or a YAML file of your own."),
    ] = None,
    data_file: Annotated[
        Path | None, typer.Option(help="Local jsonl, json, csv or parquet in place of the hub.")
    ] = None,
    compressed: Annotated[
        Path | None, typer.Option(help="What tensorllm made of the model: before and after.")
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="strict, or paper: with the quirks of the papers' scripts.")
    ] = "strict",
    split: Annotated[str, typer.Option(help="test, val (the first 20 %) or all.")] = "test",
    limit: Annotated[int | None, typer.Option(help="Examples to score at most.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results; an interrupted run goes on from it.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the results in --out.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Weights as fp32, bf16 or fp16; default: as stored.")
    ] = None,
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
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two folders of results: what changed.")
    ] = None,
    plugin: Annotated[
        list[str] | None, typer.Option(help="Module to import first, with datasets of yours.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a model on a dataset: accuracy, loss, and how sure they are.

    Examples:

      tensorllm evaluate --model demo --dataset demo

      tensorllm evaluate --model gptj --dataset fever --compressed out/ --out runs/fever

      tensorllm evaluate --compare runs/before runs/after
    """
    from tensorllm.pipeline.comparison import compare as compare_folders
    from tensorllm.pipeline.evaluate import EvaluateRequest, evaluate
    from tensorllm.reporting.scores import comparison_tables, score_tables
    from tensorllm_cli.show import print_json, print_result

    if compare is not None:
        changes = compare_folders(*compare, seed=seed)
        if json:
            print_json(changes)
        else:
            print_result(comparison_tables(changes))
        return
    if model is None or dataset is None:
        raise UserError("give --model and --dataset, or --compare A B")
    from tensorllm.pipeline.devices import Devices

    request = EvaluateRequest(
        model=model,
        dataset=dataset,
        data_file=data_file,
        compressed=compressed,
        revision=revision,
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
        plugins=plugin or (),
    )
    done = evaluate(request)
    if json:
        print_json(done.results)
    else:
        print_result(score_tables(done.results))
        if out is not None:
            print_result(f"written to {out}")
