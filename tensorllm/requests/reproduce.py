"""What `tensorllm reproduce` may be asked."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tensorllm import options
from tensorllm.options import Option
from tensorllm.requests import shared


@dataclass(frozen=True, kw_only=True)
class ReproduceRequest:
    """The published cells of a model that are to be run.

    `out` keeps a file per finished cell. `candidates` are the layers among which a layer that was
    never published is searched; None: all.
    """

    model: Annotated[str, Option("gptj, llama2 or roberta.")]
    datasets: Annotated[
        Sequence[str] | None,
        Option(
            "Some of the datasets, with commas (default: all four).",
            flag="--dataset",
            parse=options.names,
        ),
    ] = None
    weights: Annotated[
        str | None,
        Option("Local folder of the weights, or of copies from the hub, or its cache."),
    ] = None
    data: Annotated[
        Path | None,
        Option("Folder with <dataset>.jsonl, or copies from the hub, or its cache."),
    ] = None
    layer: Annotated[
        int | None,
        Option("Layer for the cells whose layer was never published; else searched."),
    ] = None
    limit: shared.Limit = None
    dtype: shared.DType = None
    device: Annotated[str, shared.DEVICE] = "auto"
    out: Annotated[
        Path, Option("Folder that keeps each finished cell; these are not run again.")
    ] = Path("reproduction")
    dry_run: Annotated[
        bool, Option("Run each cell on a tiny model; print what the real ones take.")
    ] = False
    candidates: tuple[int, ...] | None = None
