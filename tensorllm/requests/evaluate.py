"""The request of `tensorllm evaluate`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tensorllm import options
from tensorllm.io import WEIGHTS
from tensorllm.options import Option
from tensorllm.requests import shared


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest:
    """A model, alone or beside its compressed version, and the dataset that it is scored on.

    `out` is the folder of results; without one nothing is kept and nothing resumed. In Python,
    `trainer` may hold objects, and `logger` may be one of Lightning's.
    """

    model: Annotated[str | None, shared.MODEL] = None
    dataset: Annotated[
        str | None, Option("`tensorllm list datasets`, or a YAML file of your own.", metavar="NAME")
    ] = None
    data_file: shared.DataFile = None
    compressed: Annotated[
        Path | None,
        Option("What tensorllm made of the model: before and after.", opened_by=WEIGHTS),
    ] = None
    protocol: shared.Protocol = "strict"
    calibrate_prior: Annotated[
        bool, Option("Choose after the model's mean score of each choice is taken out.")
    ] = False
    split: Annotated[
        Literal["test", "val", "all"], Option("test, val (the first 20 %) or all.")
    ] = "test"
    limit: shared.Limit = None
    out: Annotated[
        Path | None, Option("Folder for results; an interrupted run goes on from it.")
    ] = None
    overwrite: shared.Overwrite = False
    revision: shared.Revision = None
    dtype: shared.DType = None
    cache: shared.Cache = "auto"
    seed: Annotated[int, Option("Of the bootstrap.", minimum=0)] = 0
    batch_tokens: Annotated[
        int | None, Option("Tokens per batch; halved where memory runs out.")
    ] = None
    accelerator: Annotated[str, Option("cpu, gpu, ... or auto.")] = "auto"
    devices: Annotated[
        str, Option("How many devices, or which: 2 or 0,1. On a CPU: processes.")
    ] = "1"
    num_nodes: Annotated[int, Option("Machines.")] = 1
    strategy: Annotated[str, Option("Lightning's: auto, ddp, ...")] = "auto"
    precision: Annotated[str | None, Option("Lightning's: 32-true, bf16-true, 16-mixed, ...")] = (
        None
    )
    trainer: Annotated[
        Mapping[str, Any],
        Option(
            "Any other option of Lightning's Trainer: key=value; may be repeated.",
            parse=options.assignments,
            repeated=True,
        ),
    ] = field(default_factory=dict)
    plugins: shared.Plugins = ()
    logger: Annotated[Any, *shared.Logger.__metadata__] = None
    log_dir: shared.LogDir = None
    verify: shared.Verify = False

    def __post_init__(self) -> None:
        options.refuse_idle(self)
