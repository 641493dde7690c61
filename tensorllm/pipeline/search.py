"""`tensorllm search-ranks`: from a request to the best layers and ranks, and their honest score."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tensorllm.architectures import RoleMatrices, parameters_of
from tensorllm.checkpoint.source import resolve
from tensorllm.data.base import ReasoningDataModule, Split
from tensorllm.errors import UserError
from tensorllm.evaluation.evaluate import make_dataset
from tensorllm.evaluation.protocol import PROTOCOLS, Protocol
from tensorllm.evaluation.scorer import is_masked
from tensorllm.pipeline.models import Loader, dtype_of
from tensorllm.pipeline.plugins import load_plugins
from tensorllm.recipes import short_names
from tensorllm.registry import one_of
from tensorllm.search.examiner import Examiner, Found
from tensorllm.search.feasible import feasible
from tensorllm.search.identity import examples_fingerprint, model_fingerprint
from tensorllm.search.kept import Budget
from tensorllm.search.prefix import default_budget
from tensorllm.search.queue import TrialQueue
from tensorllm.search.space import Space, Values, make_space
from tensorllm.search.storage import storage_errors
from tensorllm.search.worker import DIRECTIONS, SAMPLERS, Rules, Worker, make_sampler

GRID = 100  # points up to which a space is searched whole
TRIALS = 100

Warn = Callable[[str], None]
Progress = Callable[["SearchRun", TrialQueue], None]


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """What the user asked for; None where the model's sizes or a default decide.

    Attributes:
        fixed: other fields of the compressor, for every trial.
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
        for size in (self.cache_bytes, self.disk_cache_bytes):
            if size is not None and size < 0:
                raise UserError(f"the cache must have 0 bytes or more, got {size}")

    def data(self, split: Split) -> ReasoningDataModule:
        """The dataset's validation or test part."""
        name = self.dataset or short_names().get(self.model, {}).get("default_dataset")
        if name is None:
            raise UserError("give --dataset: see `tensorllm list datasets`")
        return make_dataset(name, data_file=self.data_file, split=split, limit=self.limit)


class SearchRun:
    """A search under way in this process: model, data and space, each made once."""

    def __init__(self, request: SearchRequest) -> None:
        load_plugins(request.plugins)
        self.request = request
        self.source = resolve(request.model, request.revision)
        self.loader = Loader(self.source.folder, dtype_of(request.dtype))
        self.protocol: Protocol = PROTOCOLS[request.protocol]
        _ = self.points  # a ratio that cannot be met is refused now

    @cached_property
    def model(self) -> PreTrainedModel:
        device = self.request.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
        return self.loader().to(device)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.loader.tokenizer()

    @cached_property
    def roles(self) -> RoleMatrices:
        return RoleMatrices(self.model.config, parameters_of(self.model))

    @cached_property
    def space(self) -> Space:
        r = self.request
        given = {"R1": r.r1, "R2": r.r2, "R3": r.r3}
        return make_space(
            self.roles,
            r.mode,
            layers=r.layers,
            ranks={name: ranks for name, ranks in given.items() if ranks},
            rhos=r.rho,
            matrices=r.matrices,
            together=r.together,
            tied=r.tied,
            fixed={**r.fixed, **({"layout": r.layout} if r.layout else {})},
        )

    @cached_property
    def points(self) -> list[dict[str, Any]]:
        """The grid's points that meet the ratio, later layers first, otherwise in random order."""
        import random

        points = feasible(self.space, self.roles, self.request.rules.min_ratio)
        random.Random(self.request.seed).shuffle(points)
        trials = self.request.trials
        if self.grid and trials is not None:
            points = points[:trials]
        return sorted(points, key=lambda values: -int(values["layer"]))

    @cached_property
    def grid(self) -> bool:
        if self.request.sampler is not None:
            return self.request.sampler == "grid"
        return len(self.space.grid) <= (self.request.trials or GRID)

    @property
    def sampler(self) -> str:
        pareto = self.request.rules.objective == "pareto"
        return self.request.sampler or ("grid" if self.grid else "nsga2" if pareto else "tpe")

    @property
    def trials(self) -> int:
        return len(self.points) if self.grid else self.request.trials or TRIALS

    @cached_property
    def validation(self) -> ReasoningDataModule:
        return self._connected("val")

    @cached_property
    def test(self) -> ReasoningDataModule:
        return self._connected("test")

    def _connected(self, split: Split) -> ReasoningDataModule:
        data = self.request.data(split)
        data.connect(self.tokenizer, masked=is_masked(self.model))
        return data

    @cached_property
    def budget(self) -> Budget:
        """What this worker may keep: its share."""
        given, workers = self.request.cache_bytes, max(1, self.request.workers)
        memory = default_budget(self.model.device) if given is None else given
        folder = self.request.study or Path(tempfile.gettempdir())
        return Budget(memory // workers, self.request.disk_cache_bytes // workers, folder)

    @cached_property
    def examiner(self) -> Examiner:
        return Examiner(
            self.model,
            self.tokenizer,
            self.validation.examples,
            self.protocol,
            max_new_tokens=self.validation.max_new_tokens,
            points=[self.space.point(values) for values in self._corners()],
            seed=self.request.seed,
            budget=self.budget,
            batch_tokens=self.request.batch_tokens,
        )

    def _corners(self) -> list[Values]:
        """Points that between them have every layer, matrix and largest rank."""
        if self.grid:
            return list(self.points)
        top = {name: values[-1] for name, values in self.space.choices.items()}
        layers = self.space.choices["layer"]
        matrices = self.space.choices.get("matrices", (None,))
        return [
            {**top, "layer": layer} | ({"matrices": m} if m is not None else {})
            for layer in layers
            for m in matrices
        ]

    def identity(self) -> dict[str, Any]:
        """What another run of the same study must have in common with this one."""
        rules = self.request.rules
        return {
            "model": f"{self.source.name} {model_fingerprint(self.model)}",
            "dataset": f"{self.validation.name} {examples_fingerprint(self.validation.examples)}",
            "protocol": self.protocol.name,
            "space": self.space.describe(),
            "objective": rules.objective,
            "max_error": rules.max_error,
            "min_ratio": rules.min_ratio,
            "grid": self.grid,
            "seed": self.request.seed,
        }

    def queue(self, folder: Path, worker: int = 0) -> TrialQueue:
        """The study, opened and checked."""
        with storage_errors("opening the study"):
            name = self.request.study.name if self.request.study else "search"
            queue = TrialQueue(
                folder,
                self.request.storage,
                name,
                DIRECTIONS[self.request.rules.objective],
                make_sampler(self.sampler, self.request.seed + worker, self.request.workers),
            )
            queue.identify(self.identity())
            return queue

    def fill(self, queue: TrialQueue) -> None:
        """Queue what is missing."""
        with storage_errors("queueing trials"):
            if self.grid:
                queue.fill_grid(self.points)
            else:
                queue.fill(self.trials)

    def work(self, queue: TrialQueue, progress: Progress | None = None) -> None:
        """Examine trials until none is left."""
        worker = Worker(queue, self.space, self.examiner, self.request.rules, grid=self.grid)
        with storage_errors("searching"):
            worker.run(None if progress is None else lambda q: progress(self, q))

    def original(self, queue: TrialQueue) -> Found:
        """The unedited model on the validation part; measured once per study."""
        known = queue.study.user_attrs.get("original")
        if known is not None:
            return Found(**known)
        found = self.examiner(None)
        queue.study.set_user_attr("original", found.to_json())
        return found


def folder_of(request: SearchRequest, stack: ExitStack) -> Path:
    """The study's folder: the given one, or a temporary one that goes with `stack`."""
    if request.study is not None:
        return request.study
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tensorllm-search-")))
