"""A search in one process: its model, data, space and study."""

import random
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from optuna.trial import FrozenTrial
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tensorllm.checkpoint.loader import Loader, dtype_of
from tensorllm.checkpoint.source import resolve
from tensorllm.commands.plugins import load_plugins
from tensorllm.commands.search import SearchRequest
from tensorllm.compression.engine import compress
from tensorllm.compression.plan import plan_jobs
from tensorllm.compressors import COMPRESSORS
from tensorllm.compressors.per_layer import PerLayer
from tensorllm.data.base import ReasoningDataModule, Split
from tensorllm.evaluation.protocol import PROTOCOLS, Protocol
from tensorllm.evaluation.scorer import context_of, is_masked
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.search.examiner import Examiner
from tensorllm.search.feasible import feasible
from tensorllm.search.found import Found
from tensorllm.search.identity import examples_fingerprint, model_fingerprint
from tensorllm.search.kept import Budget
from tensorllm.search.prefix import default_budget
from tensorllm.search.queue import TrialQueue
from tensorllm.search.space import Space, Values, make_space
from tensorllm.search.storage import storage_errors
from tensorllm.search.worker import DIRECTIONS, Worker, make_sampler

GRID = 100  # points up to which a space is searched whole
TRIALS = 100

Progress = Callable[["SearchRun", TrialQueue], None]

Watch = Callable[[Sequence[FrozenTrial]], None]


class SearchRun:
    """A search under way in this process: model, data and space, each made once."""

    def __init__(self, request: SearchRequest, watch: Watch | None = None) -> None:
        self.watch = watch
        load_plugins(request.plugins)
        _ = COMPRESSORS[request.mode]  # an unknown one is refused before the model is loaded
        self.request = request
        self.source = resolve(request.model, request.revision)
        self.loader = Loader(self.source.folder, dtype_of(request.dtype))
        self.protocol: Protocol = PROTOCOLS[request.protocol]
        _ = self.points  # a ratio that cannot be met is refused now

    @cached_property
    def model(self) -> PreTrainedModel:
        device = self.request.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
        model = self.loader().to(device)
        if self.request.base:
            compress(model, PerLayer(edits=self.request.base))
        return model

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
    def taken(self) -> frozenset[tuple[int, str]]:
        """Matrices that are edited already: (layer, role)."""
        if not self.request.base:
            return frozenset()
        base = PerLayer(edits=self.request.base)
        jobs = plan_jobs(base, self.roles, range(self.roles.layers))
        return frozenset(matrix for job in jobs for matrix in job.site.matrices)

    @cached_property
    def points(self) -> list[dict[str, Any]]:
        """The grid's points that meet the ratio, later layers first, otherwise in random order."""
        points = feasible(self.space, self.roles, self.request.rules.min_ratio, self.taken)
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
        context = context_of(self.model.config, self.tokenizer)
        data.connect(self.tokenizer, masked=is_masked(self.model), context=context)
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
            "model": f"{self.model.config.model_type} {model_fingerprint(self.model)}",
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
        rules, taken = self.request.rules, self.taken
        worker = Worker(queue, self.space, self.examiner, rules, grid=self.grid, taken=taken)
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
