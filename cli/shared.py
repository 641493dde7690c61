"""Options that several commands have: one wording, one metavar, one completion."""

import typer

from tensorllm_cli import names

MODEL = typer.Option(
    metavar="MODEL",
    autocompletion=names.models,
    help="Short name (`tensorllm list models`), local folder, or hub id.",
)
MODE = typer.Option(
    metavar="NAME", autocompletion=names.modes, help="Strategy: `tensorllm list compressors`."
)
DATASET = typer.Option(
    metavar="NAME",
    autocompletion=names.datasets,
    help="`tensorllm list datasets`, or a YAML file of your own.",
)
DATA_FILE = typer.Option(
    metavar="FILE", help="Local jsonl, json, csv or parquet in place of the hub."
)
LIMIT = typer.Option(metavar="N", min=1, help="Examples to score at most.")
LAYOUT = typer.Option(
    metavar="NAME",
    autocompletion=lambda: ["paper", "official"],
    help="How heads are cut: paper or official (authors' code).",
)
PROTOCOL = typer.Option(
    metavar="NAME",
    autocompletion=names.protocols,
    help="strict, or paper: with the quirks of the papers' scripts.",
)
REVISION = typer.Option(metavar="NAME", help="Branch, tag or commit on the hub.")
DTYPE = typer.Option(
    metavar="NAME",
    autocompletion=names.dtypes,
    help="Weights as fp32, bf16 or fp16; default: as stored.",
)
DEVICE = typer.Option(
    metavar="NAME", autocompletion=names.devices, help="auto, cpu, cuda, cuda:1, mps."
)
POLICY = typer.Option(
    metavar="NAME",
    autocompletion=names.policies,
    help="Factored layers: always, or auto: those that gain by it.",
)
OVERWRITE = typer.Option("--overwrite", help="Replace what is there.")
PLUGIN = typer.Option(metavar="MODULE", help="Module of yours to import first; may be repeated.")
LOGGER = typer.Option(
    metavar="NAME",
    autocompletion=names.loggers,
    help="Metrics to tensorboard, csv or another of Lightning's loggers.",
)
LOG_DIR = typer.Option(metavar="FOLDER", help="Where the logger writes (default: logs).")
VERIFY = typer.Option(
    "--verify", help="Compare checksums of what tensorllm wrote; takes longer than loading."
)
JSON = typer.Option("--json", help="Print JSON.")
