"""Options that several commands have, in one wording."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from tensorllm.model_names import check_name
from tensorllm.options import Option


def _model(flag: str, name: str) -> str:
    """The name that was typed, refused before anything slow is imported if it can be no model."""
    del flag
    check_name(name)
    return name


MODEL = Option(
    "Short name (`tensorllm list models`), local folder, or hub id.", metavar="MODEL", parse=_model
)
MODE = Option("Strategy: `tensorllm list compressors`.", metavar="NAME")
LAYOUT = Option("How heads are cut: paper or official (authors' code).", metavar="NAME")
DATA_FILE = Option("Local jsonl, json, csv or parquet in place of the hub.", metavar="FILE")
LIMIT = Option("Examples to score at most.", metavar="N", minimum=1)
DEVICE = Option("auto, cpu, cuda, cuda:1, mps.", metavar="NAME")

Policy = Annotated[
    Literal["auto", "always"],
    Option("Factored layers: always, or auto: those that gain by it.", metavar="NAME"),
]
Cache = Annotated[
    Literal["auto", "latent", "dense"],
    Option(
        "Keys and values: latent (less memory), dense, or auto: latent where not slower.",
        metavar="NAME",
    ),
]
DataFile = Annotated[Path | None, DATA_FILE]
Limit = Annotated[int | None, LIMIT]
Protocol = Annotated[
    str, Option("strict, or paper: with the quirks of the papers' scripts.", metavar="NAME")
]
Revision = Annotated[str | None, Option("Branch, tag or commit on the hub.", metavar="NAME")]
DType = Annotated[
    str | None, Option("Weights as fp32, bf16 or fp16; default: as stored.", metavar="NAME")
]
Overwrite = Annotated[bool, Option("Replace what is there.", needs=("out",))]
Plugins = Annotated[
    Sequence[str],
    Option(
        "Module of yours to import first; may be repeated.",
        flag="--plugin",
        metavar="MODULE",
        repeated=True,
    ),
]
Logger = Annotated[
    str | None,
    Option("Metrics to tensorboard, csv or another of Lightning's loggers.", metavar="NAME"),
]
LogDir = Annotated[
    Path | None,
    Option("Where the logger writes (default: logs).", metavar="FOLDER", opened_by="a logger"),
]
Verify = Annotated[
    bool, Option("Compare checksums of what tensorllm wrote; takes longer than loading.")
]
