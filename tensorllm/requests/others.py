"""The requests of the smaller commands, from inspect to report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tensorllm import options
from tensorllm.io import WEIGHTS
from tensorllm.options import Option
from tensorllm.requests import shared


@dataclass(frozen=True, kw_only=True)
class InspectRequest:
    """A model whose spectra are shown, and the energy shares for which ranks are shown."""

    model: Annotated[str, shared.MODEL]
    layers: Annotated[
        tuple[int, ...] | None,
        Option("Such as 27, 0,1 or 8-27 (default: all).", parse=options.candidates),
    ] = None
    energy: Annotated[
        tuple[float, ...],
        Option(
            "Shares of the energy to find ranks for (default: 0.5,0.9,0.99).",
            parse=options.shares,
        ),
    ] = (0.5, 0.9, 0.99)
    revision: shared.Revision = None
    plugins: shared.Plugins = ()


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """A model and the prompts that it continues."""

    model: Annotated[str, shared.MODEL]
    prompts: Annotated[
        tuple[str, ...],
        Option("What to go on from; may be repeated.", flag="--prompt", repeated=True),
    ]
    chat: Annotated[
        bool, Option("The prompts are messages of a user: put the model's chat template around.")
    ] = False
    max_new_tokens: Annotated[int, Option("Tokens to write at most.")] = 64
    temperature: Annotated[float, Option("0: always the likeliest token.")] = 0.0
    top_p: Annotated[
        float, Option("Share of probability to sample from.", needs=("temperature",))
    ] = 1.0
    beams: Annotated[int, Option("Of the beam search.")] = 1
    seed: Annotated[
        int,
        Option("Of the sampling.", minimum=0, maximum=options.MAX_SEED, needs=("temperature",)),
    ] = 0
    policy: shared.Policy = "always"
    cache: shared.Cache = "auto"
    dtype: shared.DType = None
    device: Annotated[str, shared.DEVICE] = "cpu"
    revision: shared.Revision = None
    plugins: shared.Plugins = ()
    verify: shared.Verify = False


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """A model, and how much text it writes into which file."""

    model: Annotated[str, shared.MODEL]
    out: Annotated[Path, Option("The file to make, FILE.jsonl.", metavar="FILE")]
    sequences: Annotated[int, Option("Sequences to write.", minimum=1)] = 96
    length: Annotated[
        int | None, Option("Tokens of each (default: 512, or the model's context).", minimum=2)
    ] = None
    seed: Annotated[int, Option("Of the sampling.", minimum=0, maximum=options.MAX_SEED)] = 0
    overwrite: shared.Overwrite = False
    dtype: shared.DType = None
    device: Annotated[str, shared.DEVICE] = "cpu"
    revision: shared.Revision = None
    plugins: shared.Plugins = ()
    verify: shared.Verify = False


@dataclass(frozen=True, kw_only=True)
class ServeRequest:
    """A model, and the address at which it is served."""

    model: Annotated[str, shared.MODEL]
    host: Annotated[str, Option("Address to listen at.", metavar="NAME")] = "localhost"
    port: Annotated[int, Option("Port to listen at.")] = 8000
    cache: shared.Cache = "auto"
    dtype: shared.DType = None
    device: Annotated[str, shared.DEVICE] = "cpu"
    revision: shared.Revision = None
    plugins: shared.Plugins = ()


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """A factored folder, and the format in which it is rewritten."""

    folder: Annotated[
        Path,
        Option("A factored folder; for narrow also a dense one.", argument=True, opened_by=WEIGHTS),
    ]
    out: Annotated[
        Path, Option("The folder to make.", metavar="OUT", argument=True, opened_by=WEIGHTS)
    ]
    format: Annotated[
        str | None,
        Option(
            "dense (the default): an ordinary checkpoint; narrow: one whose FFN is less wide; "
            "onnx or exported-program: a graph that runs in the factors.",
            metavar="NAME",
        ),
    ] = None
    quantize: Annotated[
        str | None, Option("Stay factored, with factors in int8 or int4.", metavar="NAME")
    ] = None
    dtype: shared.DType = None
    overwrite: shared.Overwrite = False
    plugins: shared.Plugins = ()


@dataclass(frozen=True, kw_only=True)
class PushRequest:
    """A folder, and its repository on the hub."""

    folder: Annotated[
        Path, Option("A folder that tensorllm wrote.", argument=True, opened_by=WEIGHTS)
    ]
    repo: Annotated[str, Option("Its name there: OWNER/NAME.", metavar="REPO", argument=True)]
    private: Annotated[bool, Option("Make the repository private, where it has to be made.")] = (
        False
    )
    message: Annotated[str, Option("Of the commit.")] = "Upload by tensorllm push"


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """A factored folder to measure; `peak`: also its memory, each model in its own process."""

    model: Annotated[Path, Option("A factored folder.", opened_by=WEIGHTS)]
    prompt_tokens: Annotated[
        int | None, Option("Of the prompt (default: 512, or what the model takes).")
    ] = None
    new_tokens: Annotated[
        int | None, Option("Decoded behind it (default: 32, or what the model takes).")
    ] = None
    repeats: Annotated[int, Option("Turns; the median counts.")] = 5
    policy: shared.Policy = "always"
    cache: shared.Cache = "auto"
    dtype: shared.DType = None
    device: Annotated[str, shared.DEVICE] = "cpu"
    plugins: shared.Plugins = ()
    peak: bool = True


@dataclass(frozen=True, kw_only=True)
class ReportRequest:
    """Runs to be shown on one page."""

    runs: Annotated[
        Sequence[Path],
        Option(
            "Folders that compress, evaluate or search-ranks wrote; files of bench --json.",
            metavar="RUN...",
            repeated=True,
            argument=True,
        ),
    ]
    out: Annotated[Path, Option("The page to write.")] = Path("report.html")
    card: Annotated[bool, Option("Put what was measured into the checkpoints' README.md too.")] = (
        False
    )


@dataclass(frozen=True, kw_only=True)
class ListRequest:
    """What to list."""

    kind: Annotated[
        str,
        Option(
            "compressors, architectures, models, datasets or recipes.",
            metavar="KIND",
            argument=True,
        ),
    ]
    plugins: shared.Plugins = ()
