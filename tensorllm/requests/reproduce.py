"""The request of `tensorllm reproduce`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tensorllm import options
from tensorllm.options import Option
from tensorllm.registry import one_of
from tensorllm.requests import shared

STUDIES = ("published", "claims")
OF_PUBLISHED, OF_CLAIMS = ("study=published",), ("study=claims",)


@dataclass(frozen=True, kw_only=True)
class ReproduceRequest:
    """The published cells of a model to run, or the study of the papers' claim.

    `out` keeps a file per finished cell. `candidates` are the layers among which a layer that was
    never published is searched; None: all. `validation`, `trials` and `draws` belong to the study,
    `weights` and `layer` to the published cells.
    """

    model: Annotated[
        str, Option("gptj, llama2 or roberta; in --study claims any causal model.")
    ] = "demo"
    study: Annotated[
        str,
        Option("published cells, or claims: whether edits chosen on some rows help others."),
    ] = "published"
    datasets: Annotated[
        Sequence[str] | None,
        Option(
            "Some of the datasets, with commas (default: all four; of demo its own).",
            flag="--dataset",
            parse=options.names,
        ),
    ] = None
    weights: Annotated[
        str | None,
        Option(
            "Local folder of the weights, or of copies from the hub, or its cache.",
            needs=OF_PUBLISHED,
        ),
    ] = None
    data: Annotated[
        Path | None,
        Option("Folder with <dataset>.jsonl, or copies from the hub, or its cache."),
    ] = None
    layer: Annotated[
        int | None,
        Option(
            "Layer for the cells whose layer was never published; else searched.",
            needs=OF_PUBLISHED,
        ),
    ] = None
    limit: shared.Limit = None
    validation: Annotated[
        int,
        Option(
            "Claims: rows an edit is chosen on, at most half of those left.",
            minimum=1,
            needs=OF_CLAIMS,
        ),
    ] = 200
    trials: Annotated[
        int, Option("Claims: edits examined, best predicted first.", minimum=1, needs=OF_CLAIMS)
    ] = 4
    draws: Annotated[
        int, Option("Claims: draws of the rows an edit is chosen on.", minimum=1, needs=OF_CLAIMS)
    ] = 3
    dtype: shared.DType = None
    device: Annotated[str, shared.DEVICE] = "auto"
    out: Annotated[
        Path, Option("Folder that keeps each finished cell; these are not run again.")
    ] = Path("reproduction")
    dry_run: Annotated[
        bool,
        Option("Run each cell on a tiny model; print what the real ones take.", needs=OF_PUBLISHED),
    ] = False
    candidates: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        one_of("--study", self.study, STUDIES)
        options.refuse_idle(self)
