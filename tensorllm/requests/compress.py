"""The request of `tensorllm compress`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tensorllm import options
from tensorllm.io import WEIGHTS
from tensorllm.options import Option
from tensorllm.requests import shared

SETTINGS = (
    *("ranks", "energy", "error", "rho", "rank", "matrices", "layout"),
    *("target_ratio", "target_params", "target_bytes", "max_loss_increase", "distill_steps"),
)
# Fields that only the command line may set; a recipe may set all others.
ONLY_TYPED = ("config", "settings", "plugins", "dry_run")
SEQUENCES = 128
OF_TEXT, OF_SCORES = ("calibration",), ("evaluate",)


@dataclass(frozen=True, kw_only=True)
class CompressRequest:
    """A model, how it is compressed, and where the result goes.

    A field that is None (or False) is set by the recipe, or else by a default. `ranks` to
    `distill_steps` and the entries of `settings` are fields of the mode (`given`).
    """

    model: Annotated[str | None, shared.MODEL] = None
    mode: Annotated[str | None, shared.MODE] = None
    config: Annotated[Path | None, Option("A recipe (YAML) instead of --mode.")] = None
    dataset: Annotated[str | None, Option("Take the shipped recipe for this dataset.")] = None
    layers: Annotated[
        tuple[int, ...] | Literal["all"] | None,
        Option("Such as 27, 0,1, 8-27 or all (default: recipe, else all).", parse=options.layers),
    ] = None
    ranks: Annotated[
        tuple[int, ...] | None,
        Option("Tucker ranks R1,R2,R3 of width, head_dim, matrices.", parse=options.whole_numbers),
    ] = None
    energy: Annotated[
        float | None, Option("Instead of ranks: energy to keep per mode, in (0, 1].")
    ] = None
    error: Annotated[
        float | None, Option("Instead of ranks: relative error allowed, in [0, 1).")
    ] = None
    rho: Annotated[float | None, Option("LASER: share of the full rank to keep, in (0, 1].")] = None
    rank: Annotated[int | None, Option("Modes with one rank: the rank itself.")] = None
    matrices: Annotated[
        tuple[str, ...] | None,
        Option("Which of q,k,v,o,in,gate,out, where the mode asks.", parse=options.names),
    ] = None
    layout: Annotated[str | None, shared.LAYOUT] = None
    target_ratio: Annotated[
        float | tuple[float, ...] | None,
        Option(
            "Instead: how much smaller, over 1; spread over layers. Several, as 1.2,1.5,2: "
            "folders OUT/1.2, ... from one measurement of --calibration.",
            parse=options.numbers,
            metavar="X",
        ),
    ] = None
    target_params: Annotated[
        int | None, Option("Instead: parameters that the whole model may keep.")
    ] = None
    target_bytes: Annotated[
        int | None,
        Option(
            "Instead: bytes of the weight files, such as 60MiB; factored, with factors and "
            "matrices in int8 and int4 where that pays.",
            parse=options.size,
            metavar="SIZE",
        ),
    ] = None
    calibration: Annotated[
        Path | None, Option("Modes that use data: a text file to fit to.", reads="text")
    ] = None
    sampled: Annotated[
        Path | None,
        Option(
            "With --calibration: text of the model's own to add (`tensorllm sample`).",
            reads="text",
        ),
    ] = None
    max_loss_increase: Annotated[
        float | None,
        Option("With --calibration, instead: nats per token the loss may rise there."),
    ] = None
    distill_steps: Annotated[
        int | None, Option("With --calibration: steps to train the factors afterwards.")
    ] = None
    distill_text: Annotated[
        Path | None,
        Option(
            "With --distill-steps: text to train on instead, such as the model's own (`tensorllm "
            "sample`), which helps most on other text.",
            reads="text",
            needs=OF_TEXT,
        ),
    ] = None
    stream: Annotated[bool, Option("Calibrate layer by layer from disk: too big for memory.")] = (
        False
    )
    allow_overlap: Annotated[
        bool, Option("Let --evaluate score rows of the calibration text.", needs=OF_TEXT)
    ] = False
    sequences: Annotated[
        int | None,
        Option(f"Calibration sequences to draw (default: {SEQUENCES}).", minimum=1, needs=OF_TEXT),
    ] = None
    length: Annotated[
        int | None,
        Option(
            "Tokens of each (default: 512, or the model's context).",
            minimum=2,
            needs=OF_TEXT,
        ),
    ] = None
    seed: Annotated[
        int | None,
        Option("Of that draw (default: 0).", minimum=0, maximum=options.MAX_SEED, needs=OF_TEXT),
    ] = None
    settings: Annotated[
        Mapping[str, Any],
        Option(
            "Any other field of the mode: field=value.",
            flag="--set",
            parse=options.assignments,
            repeated=True,
        ),
    ] = field(default_factory=dict)
    out: Annotated[Path | None, Option("Folder to write the checkpoint to.", opened_by=WEIGHTS)] = (
        None
    )
    format: Annotated[
        str | None,
        Option(
            "dense (loads anywhere; the default), factored (small on disk), or narrow: an ordinary "
            "checkpoint whose FFN is less wide, of modes that drop channels.",
            needs=("out", "dry_run"),
        ),
    ] = None
    dtype: shared.DType = None
    device: Annotated[str | None, shared.DEVICE] = None
    overwrite: shared.Overwrite = False
    evaluate: Annotated[str | None, Option("Score on this dataset before and after.")] = None
    data_file: Annotated[Path | None, replace(shared.DATA_FILE, needs=OF_SCORES)] = None
    limit: Annotated[int | None, replace(shared.LIMIT, needs=OF_SCORES)] = None
    dry_run: Annotated[bool, Option("Print the plan and its cost; do nothing.")] = False
    revision: shared.Revision = None
    plugins: shared.Plugins = ()
    logger: shared.Logger = None
    log_dir: shared.LogDir = None

    @property
    def given(self) -> dict[str, Any]:
        """The fields of the mode that were given."""
        named = {name: getattr(self, name) for name in SETTINGS}
        return {k: v for k, v in named.items() if v is not None} | dict(self.settings)
