"""What is asked of `tensorllm search-ranks`."""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
        fixed: other fields of the compressor, for every trial.
        compose: how many edits at most are put on top of one another, the best one first.
        base: edits (of `PerLayer`) that the model has before the search begins.
        trials: how many; None: the whole grid, or 100 of another sampler.
        sampler: `grid`, `tpe` or `nsga2`; None: a grid if it has at most 100 points.
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
    r1: tuple[int, ...] | None = None
    r2: tuple[int, ...] | None = None
    r3: tuple[int, ...] | None = None
    rho: tuple[float, ...] | None = None
    matrices: tuple[str, ...] | None = None
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
        if self.compose > 1 and self.rules.objective == "pareto":
            raise UserError("--compose needs one best trial: --objective accuracy or loss")
        for size in (self.cache_bytes, self.disk_cache_bytes):
            if size is not None and size < 0:
                raise UserError(f"the cache must have 0 bytes or more, got {size}")

    def data(self, split: Split) -> ReasoningDataModule:
        """The dataset's validation or test part."""
        name = self.dataset or short_names().get(self.model, {}).get("default_dataset")
        if name is None:
            raise UserError("give --dataset: see `tensorllm list datasets`")
        return make_dataset(name, data_file=self.data_file, split=split, limit=self.limit)


def folder_of(request: SearchRequest, stack: ExitStack) -> Path:
    """The study's folder: the given one, or a temporary one that goes with `stack`."""
    if request.study is not None:
        return request.study
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tensorllm-search-")))
