"""The request of `tensorllm search-ranks`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tensorllm import options
from tensorllm.errors import UserError
from tensorllm.options import Option, Value, above, at_least
from tensorllm.registry import one_of
from tensorllm.requests import shared

SAMPLERS = ("grid", "tpe", "nsga2")
GUIDES = ("gradient",)
Values = tuple[Value, ...] | None


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """A model, a dataset, and the dimensions of a mode that are varied.

    Attributes:
        fixed: other fields of the compressor, for every trial.
        base: edits (of `PerLayer`) that the model has before the search begins.
        study: folder of the study; None: a temporary one.
        sequences: of the calibration text, drawn by `seed`.
        device: such as `cuda:1`; None: the first GPU if there is one.
    """

    model: Annotated[str, shared.MODEL]
    dataset: Annotated[
        str | None,
        Option("`tensorllm list datasets`, or YAML files; several: a,b (default: the model's)."),
    ] = None
    mode: Annotated[
        str, Option("Any that says what may be varied: `tensorllm list compressors`.")
    ] = "shared-tucker"
    objective: Annotated[
        str, Option("accuracy, loss, pareto (accuracy against ratio), or a plugin's.")
    ] = "accuracy"
    layers: Annotated[
        tuple[int, ...] | None,
        Option("Candidates such as 8-27 (default: all).", parse=options.candidates),
    ] = None
    together: Annotated[int, Option("Neighbouring layers edited at once.")] = 1
    compose: Annotated[int, Option("Edits put on top of one another, while validation gains.")] = 1
    r1: Annotated[Values, Option("Values of R1 (model width) to try.", parse=options.values)] = None
    r2: Annotated[Values, Option("Values of R2 (head width) to try.", parse=options.values)] = None
    r3: Annotated[Values, Option("Values of R3 (matrices) to try.", parse=options.values)] = None
    tied: Annotated[bool, Option("R1 = heads * R2, as the authors published.")] = False
    rho: Annotated[Values, Option("Shares of the rank LASER keeps.", parse=options.values)] = None
    matrices: Annotated[
        tuple[str, ...] | None,
        Option("Sets of matrices LASER edits, such as in,out,in+out.", parse=options.names),
    ] = None
    vary: Annotated[
        Mapping[str, Sequence[Value]],
        Option(
            "Values of any dimension of the mode: NAME=V1,V2 (repeatable).",
            parse=options.named_values,
            repeated=True,
        ),
    ] = field(default_factory=dict)
    layout: Annotated[str | None, shared.LAYOUT] = None
    calibration: Annotated[
        Path | None, Option("Text file, for modes that are fitted to text.", reads="text")
    ] = None
    sampled: Annotated[
        Path | None,
        Option(
            "With --calibration: text of the model's own to add (`tensorllm sample`).",
            reads="text",
        ),
    ] = None
    allow_overlap: Annotated[
        bool, Option("Let the calibration text hold rows scored.", needs=("calibration",))
    ] = False
    max_error: Annotated[float | None, Option("Largest relative error of a decomposition.")] = None
    min_ratio: Annotated[
        float | None,
        Option("Least ratio of the matrices' parameters (default: 1; 0: any)."),
    ] = None
    trials: Annotated[int | None, Option("How many (default: a grid of up to 100, else 100).")] = (
        None
    )
    sampler: Annotated[str | None, Option("grid, tpe or nsga2 (default: by the space's size).")] = (
        None
    )
    guide: Annotated[
        str | None,
        Option("gradient: try what one backward pass predicts to be best (per edit)."),
    ] = None
    seed: Annotated[
        int,
        Option("Of the order, the sampler and the bootstrap.", minimum=0, maximum=options.MAX_SEED),
    ] = 0
    stop_level: Annotated[
        float, Option("Chance of pruning the best trial early; 0: only when it has lost.")
    ] = 0.001
    full: Annotated[bool, Option("Examine every trial to its end.")] = False
    time_limit: Annotated[
        float | None,
        Option("Begin no trial after 90s, 10m or 2h; the study goes on.", parse=options.seconds),
    ] = None
    force_best: Annotated[bool, Option("Keep the winner though it is not found better.")] = False
    study: Annotated[Path | None, Option("Folder of the study; an interrupted one goes on.")] = None
    storage: Annotated[str | None, Option("Database URL, for workers on many machines.")] = None
    workers: Annotated[int, Option("Processes on this machine, one per GPU.")] = 1
    protocol: shared.Protocol = "strict"
    data_file: Annotated[
        Path | None,
        Option("Local file in place of the hub; of several datasets: a.csv,b.csv.", metavar="FILE"),
    ] = None
    limit: Annotated[
        int | None, Option("Examples at most, of each validation and test part.", minimum=1)
    ] = None
    cache_gib: Annotated[
        float | None, Option("Memory for activations (default: 1/4 of what is free).")
    ] = None
    disk_cache_gib: Annotated[
        float, Option("Disk for activations that this memory does not hold.")
    ] = 0.0
    revision: shared.Revision = None
    dtype: shared.DType = None
    plugins: shared.Plugins = ()
    logger: shared.Logger = None
    log_dir: shared.LogDir = None
    base: tuple[Any, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    sequences: int = 128
    batch_tokens: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        options.refuse_idle(self)
        for name in ("trials", "compose"):
            at_least(self, name, 1)
        for name in ("min_ratio", "cache_gib", "disk_cache_gib"):
            at_least(self, name, 0)
        for name in ("max_error", "time_limit"):
            above(self, name, 0)
        if not 0 <= self.stop_level < 1:
            raise UserError(f"--stop-level must be in [0, 1), got {self.stop_level}")
        if self.full and self.stop_level != SearchRequest.stop_level:
            raise UserError("--stop-level does nothing with --full, which stops no trial early")
        if self.sampler is not None:
            one_of("--sampler", self.sampler, SAMPLERS)
        if self.guide is not None:
            one_of("--guide", self.guide, GUIDES)
            if self.sampler not in (None, "grid"):
                raise UserError(f"--guide orders a grid: give no --sampler {self.sampler}")

    @property
    def varied(self) -> dict[str, Sequence[Value]]:
        """All values that were given, by dimension."""
        named = {"R1": self.r1, "R2": self.r2, "R3": self.r3}
        named |= {"rho": self.rho, "matrices": self.matrices}
        twice = [name for name, values in named.items() if values and name in self.vary]
        if twice:
            raise UserError(f"{twice[0]} is given twice: by --vary and by an option of its own")
        return {name: values for name, values in {**named, **self.vary}.items() if values}

    @property
    def level(self) -> float | None:
        """Probability with which the best trial may be pruned early; None: no trial is pruned."""
        return None if self.full else self.stop_level

    @property
    def least_ratio(self) -> float:
        """Least ratio of numbers in the decomposed matrices to those stored; 1: nothing grows."""
        return 1.0 if self.min_ratio is None else self.min_ratio
