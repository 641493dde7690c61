"""A search as one process sees it: its model, data, space and trials."""

import random
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tensorllm.calibration.fit import Fitted
from tensorllm.calibration.overlap import refuse_evaluated
from tensorllm.calibration.sequences import Calibration, text_asked_for
from tensorllm.checkpoint.loader import Loader, dtype_of
from tensorllm.checkpoint.source import resolve
from tensorllm.compression.engine import compress
from tensorllm.compression.jobs import CompressedSite, decomposed
from tensorllm.compression.plan import plan_jobs
from tensorllm.compressors import COMPRESSORS, Compressor
from tensorllm.compressors.per_layer import PerLayer
from tensorllm.environment import printable
from tensorllm.errors import UserError
from tensorllm.evaluation.protocol import PROTOCOLS, Protocol
from tensorllm.evaluation.scorer import context_of, is_masked
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.registry import one_of
from tensorllm.requests.search import SearchRequest
from tensorllm.search.activation_cache import CacheBudget
from tensorllm.search.datasets import SearchDataset, need_answers, search_datasets, sources_of
from tensorllm.search.decompositions import ModelEdit, edit_of_fit, edit_of_sites
from tensorllm.search.examiner import Examiner
from tensorllm.search.feasible import feasible
from tensorllm.search.fingerprints import examples_fingerprint, model_fingerprint
from tensorllm.search.guide import Guided, guided, in_order, trials_for
from tensorllm.search.objectives import OBJECTIVES, Objective, over_datasets
from tensorllm.search.prefix import default_budget
from tensorllm.search.queue import TrialQueue
from tensorllm.search.samplers import SAMPLERS, Sampler
from tensorllm.search.space import (
    LAYER,
    Matrices,
    Point,
    Space,
    corners,
    make_space,
    spread,
)
from tensorllm.search.storage import storage_errors
from tensorllm.search.trial import TrialResult
from tensorllm.search.worker import Worker

GRID = 100  # a space of at most this many points is searched exhaustively
TRIALS = 100
GIB = 2**30

OnTrial = Callable[["Study", TrialQueue], None]


class Study:
    """A search running in this process; model, data and space are each loaded once.

    Plugins must be imported already.

    Args:
        request: what is searched, and how.
        deadline: `time.time()` after which no trial is begun; None: set by the request.
    """

    def __init__(self, request: SearchRequest, deadline: float | None = None) -> None:
        if deadline is None and request.time_limit is not None:
            deadline = time.time() + request.time_limit
        self.deadline = deadline
        one_of("--objective", request.objective, OBJECTIVES.names())
        self.goal = OBJECTIVES[request.objective]
        if request.compose > 1 and self.goal.several:
            raise UserError("--compose needs one best trial: --objective accuracy or loss")
        _ = COMPRESSORS[request.mode]  # refuse an unknown mode before the model is loaded
        self.request = request
        self.asked = sources_of(request)
        self._questions = search_datasets(self.asked, request.limit)
        self.source = resolve(request.model, request.revision)
        self.loader = Loader(self.source.folder, dtype_of(request.dtype)).quickest(self.device)
        self.protocol: Protocol = PROTOCOLS[request.protocol]
        _ = self.calibration  # refuse a text that cannot be read before the model is loaded
        _ = self.points  # refuse a ratio that cannot be met now

    @property
    def device(self) -> str:
        return self.request.device or ("cuda:0" if torch.cuda.is_available() else "cpu")

    @cached_property
    def model(self) -> PreTrainedModel:
        model = self.loader().to(self.device)
        if self.request.base:
            base = PerLayer(edits=self.request.base)
            compress(model, base, calibration=self.calibration)
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
        return make_space(
            self.roles,
            r.mode,
            layers=r.layers,
            values=r.varied,
            together=r.together,
            left_out=("R1",) if r.tied else (),
            fixed={**r.fixed, **({"layout": r.layout} if r.layout else {})},
        )

    @cached_property
    def excluded(self) -> Matrices:
        """Matrices that the edits of `base` already change."""
        if not self.request.base:
            return frozenset()
        base = PerLayer(edits=self.request.base)
        jobs = plan_jobs(base, self.roles, None)
        return frozenset(matrix for job in jobs for matrix in job.site.matrices)

    @cached_property
    def feasible(self) -> list[dict[str, Any]]:
        """The grid's points that meet the least ratio."""
        return feasible(self.space, self.roles, self.request.least_ratio, self.excluded)

    @property
    def too_large(self) -> int:
        """Number of the grid's points that are left out because they are too large."""
        anywhere = 0 if self.excluded else len(self.space.grid)
        return max(0, anywhere - len(self.feasible))

    @cached_property
    def points(self) -> list[dict[str, Any]]:
        """The points to try: later layers of the model first, otherwise in random order.

        A guided search takes those with the largest predicted decrease of the loss instead.
        """
        if self.guide is not None:
            changes = [self.guide.change[self.space.point(v).key] for v in self.feasible]
            order = in_order(changes, [int(values[LAYER]) for values in self.feasible])
            count = self.request.trials or trials_for(len(order))
            return [self.feasible[n] for n in order[:count]]
        points = list(self.feasible)
        random.Random(self.request.seed).shuffle(points)
        trials = self.request.trials
        if self.grid and trials is not None:
            points = points[:trials]
        return sorted(points, key=lambda values: -int(values[LAYER]))

    @cached_property
    def guide(self) -> Guided | None:
        """The predicted change of the loss at every grid point, on top of the edits of `base`.

        None: not asked for, or nothing is left to edit.
        """
        if self.request.guide is None or not self.feasible:
            return None
        return guided(self.examiner, [self.space.point(values) for values in self.feasible])

    @cached_property
    def grid(self) -> bool:
        if self.request.guide is not None:
            return True
        if self.request.sampler is not None:
            return SAMPLERS[self.request.sampler].queued
        return len(self.feasible) <= (self.request.trials or GRID)

    @property
    def sampler(self) -> Sampler:
        several = self.goal.several
        name = self.request.sampler or ("grid" if self.grid else "nsga2" if several else "tpe")
        return SAMPLERS[name]

    @property
    def trials(self) -> int:
        return len(self.points) if self.grid else self.request.trials or TRIALS

    @cached_property
    def datasets(self) -> list[SearchDataset]:
        """The search's datasets, connected to the model's tokenizer."""
        context = context_of(self.model.config, self.tokenizer)
        for questions in self._questions:
            questions.connect(self.tokenizer, masked=is_masked(self.model), context=context)
        if self.goal.prune_by == "verdicts":
            need_answers(self._questions)
        return self._questions

    @property
    def dataset(self) -> str:
        """The names of all datasets, separated by commas."""
        return ", ".join(questions.label for questions in self.datasets)

    @cached_property
    def cache_budget(self) -> CacheBudget:
        """This worker's share of the budget for activations."""
        given, workers = self.request.cache_gib, max(1, self.request.workers)
        memory = default_budget(self.model.device) if given is None else int(given * GIB)
        folder = self.request.study or Path(tempfile.gettempdir())
        disk = int(self.request.disk_cache_gib * GIB)
        return CacheBudget(memory // workers, disk // workers, folder)

    @cached_property
    def examiner(self) -> Examiner:
        possible = self.feasible  # a guide predicts all of them
        if self.request.guide is None:
            possible = self.points if self.grid else corners(self.space) or self.feasible
        return Examiner(
            self.model,
            self.tokenizer,
            [questions.asked for questions in self.datasets],
            self.protocol,
            points=[self.space.point(values) for values in possible],
            seed=self.request.seed,
            calibration=self.calibration,
            budget=self.cache_budget,
            batch_tokens=self.request.batch_tokens,
        )

    @cached_property
    def calibration(self) -> Calibration | None:
        """The calibration text, for a strategy that needs one; it must not be what is scored."""
        request = self.request
        text = text_asked_for(
            request.calibration,
            request.sampled,
            self.tokenizer,
            self.loader.config(),
            request.sequences,
            request.seed,
        )
        if text is not None and not request.allow_overlap:
            for source in self.asked:
                refuse_evaluated(text, self.tokenizer, source.name, source.data_file)
        return text

    def strategy(self, point: Point) -> Compressor | Fitted:
        """The point's strategy, fitted to the calibration text if there is one."""
        if self.calibration is None:
            return point.compressor
        return self.examiner.fitted(point)

    def decomposed(self, point: Point) -> list[CompressedSite]:
        """The sites as `compress` decomposes them: at the point's ranks, not sliced from larger."""
        return decomposed(
            self.strategy(point), self.roles, self.examiner.weights, list(point.layers)
        )

    def final_edit(self, point: Point) -> ModelEdit:
        """The edit that `compress` would write into the model."""
        strategy, roles = self.strategy(point), self.roles
        if isinstance(strategy, Fitted):
            return edit_of_fit(strategy, roles, self.examiner.weights)
        return edit_of_sites(self.decomposed(point), roles)

    def identity(self) -> dict[str, Any]:
        """What another run of the same study must have in common with this one."""
        text = {} if self.calibration is None else {"calibration": self.calibration.sha256}
        return {
            **text,
            "model": f"{self.model.config.model_type} {model_fingerprint(self.model)}",
            "dataset": ", ".join(
                f"{q.label} {examples_fingerprint(q.validation.examples)}" for q in self.datasets
            ),
            "protocol": self.protocol.name,
            "space": self.space.describe(),
            "objective": self.request.objective,
            "max_error": self.request.max_error,
            "min_ratio": self.request.least_ratio,
            "grid": self.grid,
            "guide": self.request.guide,
            "seed": self.request.seed,
        }

    def queue(self, folder: Path) -> TrialQueue:
        """Open the study and check that it is the same search."""
        with storage_errors("opening the study"):
            name = printable(self.request.study.name) if self.request.study else "search"
            queue = TrialQueue(
                folder,
                self.request.storage,
                name,
                self.goal.directions,
                self.sampler.make(self.request.seed, self.request.workers),
            )
            queue.identify(self.identity())
            return queue

    def fill(self, queue: TrialQueue) -> None:
        """Queue the trials that are missing."""
        with storage_errors("queueing trials"):
            if self.grid:
                queue.fill_grid(self.points)
            else:
                queue.fill(self.trials, spread(self.space, self.trials, self.request.seed))

    def work(self, queue: TrialQueue, on_trial: OnTrial | None = None) -> None:
        """Examine trials until none is left."""
        worker = Worker(
            queue,
            self.space,
            self.examiner,
            self.request,
            goal=self.goal_of(queue),
            original=self.reference(queue) if len(self.datasets) > 1 else None,
            sampler=self.sampler,
            excluded=self.excluded,
            deadline=self.deadline,
        )
        with storage_errors("searching"):
            worker.run(None if on_trial is None else lambda q: on_trial(self, q))

    @property
    def late(self) -> bool:
        """Whether the time limit has passed."""
        return self.deadline is not None and time.time() >= self.deadline

    def original(self, queue: TrialQueue) -> TrialResult:
        """The unedited model's result on the validation parts; measured once per study."""
        known = queue.study.user_attrs.get("original")
        if known is not None:
            return TrialResult.from_json(known)
        result = self.examiner(None)
        queue.study.set_user_attr("original", result.to_json())
        return result

    def reference(self, queue: TrialQueue) -> TrialResult:
        """The result from which changes count: the original's, as it was in the first step."""
        known = queue.study.user_attrs.get("reference")
        return self.original(queue) if known is None else TrialResult.from_json(known)

    def goal_of(self, queue: TrialQueue, objective: str | None = None) -> Objective:
        """The search's objective, or another one; over several datasets it is the worst change."""
        goal = self.goal if objective is None else OBJECTIVES[objective]
        return goal if len(self.datasets) == 1 else over_datasets(goal, self.reference(queue))
