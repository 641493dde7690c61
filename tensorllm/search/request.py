"""What is asked of a search."""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensorllm.compressors.base import Value
from tensorllm.compressors.per_layer import Edit
from tensorllm.data.base import ReasoningDataModule, Split
from tensorllm.errors import UserError
from tensorllm.evaluation.evaluate import make_dataset
from tensorllm.recipes import short_names
from tensorllm.registry import one_of
from tensorllm.search.worker import SAMPLERS, Rules


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """What the user asked for; None where the model's sizes or a default decide.

    Attributes:
        vary: of any dimension of the mode's search space the values to try; `r1`, `r2`, `r3`,
            `rho` and `matrices` are those of the dimensions of these names.
        fixed: other fields of the compressor, for every trial.
        compose: how many edits at most are put on top of one another, the best one first.
        base: edits (of `PerLayer`) that the model has before the search begins.
        trials: how many; None: the whole grid, or 100 of another sampler.
        sampler: `grid`, `tpe` or `nsga2`; None: a grid if it has at most 100 points.
        calibration: text for a mode that is fitted to one; `sequences` of it are drawn by `seed`.
        time_limit: seconds after which no trial is begun; None: none.
        force_best: write `best.yaml` though the winner was not found to be better.
        study: folder of the study; None: a temporary one.
        storage: URL of a database for many machines.
        cache_bytes: for activations below the edited layer; None: a quarter of the free memory.
        disk_cache_bytes: for those that this memory does not hold, in files of the study's folder.
        device: such as `cuda:1`; None: the first GPU if there is one.
    """

    model: str
    dataset: str | None = None
    mode: str = "shared-tucker"
    revision: str | None = None
    data_file: Path | None = None
    protocol: str = "strict"
    limit: int | None = None
    dtype: str | None = None
    layers: tuple[int, ...] | None = None
    r1: tuple[Value, ...] | None = None
    r2: tuple[Value, ...] | None = None
    r3: tuple[Value, ...] | None = None
    rho: tuple[Value, ...] | None = None
    matrices: tuple[str, ...] | None = None
    vary: Mapping[str, Sequence[Value]] = field(default_factory=dict)
    tied: bool = False
    together: int = 1
    compose: int = 1
    base: tuple[Edit, ...] = ()
    layout: str | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    rules: Rules = field(default_factory=Rules)
    sampler: str | None = None
    trials: int | None = None
    seed: int = 0
    calibration: Path | None = None
    sequences: int = 128
    allow_overlap: bool = False
    time_limit: float | None = None
    force_best: bool = False
    study: Path | None = None
    storage: str | None = None
    workers: int = 1
    cache_bytes: int | None = None
    disk_cache_bytes: int = 0
    batch_tokens: int | None = None
    device: str | None = None
    plugins: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.trials is not None and self.trials < 1:
            raise UserError(f"--trials must be at least 1, got {self.trials}")
        if self.sampler is not None:
            one_of("--sampler", self.sampler, SAMPLERS)
        if self.compose < 1:
            raise UserError(f"--compose must be at least 1, got {self.compose}")
        if self.compose > 1 and self.rules.goal.several:
            raise UserError("--compose needs one best trial: --objective accuracy or loss")
        if self.time_limit is not None and self.time_limit <= 0:
            raise UserError(f"--time-limit must be more than 0, got {self.time_limit:g} s")
        for size in (self.cache_bytes, self.disk_cache_bytes):
            if size is not None and size < 0:
                raise UserError(f"the cache must have 0 bytes or more, got {size}")

    @property
    def values(self) -> dict[str, Sequence[Value]]:
        """All values that were given, by dimension."""
        named = {"R1": self.r1, "R2": self.r2, "R3": self.r3}
        named |= {"rho": self.rho, "matrices": self.matrices}
        twice = [name for name, values in named.items() if values and name in self.vary]
        if twice:
            raise UserError(f"{twice[0]} is given twice: by --vary and by an option of its own")
        return {name: values for name, values in {**named, **self.vary}.items() if values}

    def data(self, split: Split) -> ReasoningDataModule:
        """The dataset's validation or test part."""
        return make_dataset(
            self.dataset_name, data_file=self.data_file, split=split, limit=self.limit
        )

    @property
    def dataset_name(self) -> str:
        name = self.dataset or short_names().get(self.model, {}).get("default_dataset")
        if name is None:
            raise UserError("give --dataset: see `tensorllm list datasets`")
        return str(name)

    def folder(self, stack: ExitStack) -> Path:
        """The study's folder: the given one, or a temporary one that goes with `stack`."""
        if self.study is not None:
            return self.study
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tensorllm-search-")))
