"""Examining one point: its weights written, validation questions asked, weights restored."""

import random
import time
from collections.abc import Sequence
from contextlib import closing
from itertools import groupby, islice
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tensorllm.compression.plan import plan_jobs
from tensorllm.compressors import Job
from tensorllm.data.example import Example
from tensorllm.evaluation.causal import CausalBatch
from tensorllm.evaluation.predictions import Prediction
from tensorllm.evaluation.protocol import Protocol
from tensorllm.evaluation.scorer import is_masked, make_scorer, score_all, workers_for
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.search.bank import EXACT_BELOW, Bank, Edit, edited, nests
from tensorllm.search.feasible import ratio_of
from tensorllm.search.found import Found, found_in
from tensorllm.search.kept import NOTHING, Budget
from tensorllm.search.prefix import Prefix, PrefixForward, PrefixMaskedForward
from tensorllm.search.space import Point
from tensorllm.search.stopping import Race, Rival
from tensorllm.tensors.stacking import FFN

# After each of these shares of the validation set a losing trial may be given up. More of them
# would make batches small, which costs more than it saves.
STAGES = (1 / 8, 1 / 4, 1 / 2, 1)
LEAST = 32  # examples in a stage


class TooFar(Exception):
    """The decomposition's relative error is beyond what was allowed."""


class Examiner:
    """Scores points on the validation examples with one model, in place.

    Args:
        model: unedited, in eval mode.
        tokenizer: its tokenizer.
        examples: of the validation part.
        protocol: what counts as right.
        max_new_tokens: how long a generated answer may be.
        points: all that may be asked for; they say how large the decompositions must be.
        seed: of the order of the examples.
        budget: for activations below the edited layer.
        batch_tokens: tokens of a batch; None: what suits the device.
        exact_below: see `Bank`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        protocol: Protocol,
        *,
        max_new_tokens: int,
        points: Sequence[Point],
        seed: int = 0,
        budget: Budget = NOTHING,
        batch_tokens: int | None = None,
        exact_below: int = EXACT_BELOW,
    ) -> None:
        self.weights = parameters_of(model)
        self.roles = RoleMatrices(model.config, self.weights)
        self.bank = Bank(self.roles, self.weights, self._largest(points), exact_below=exact_below)
        candidates = {min(point.layers) for point in points}
        self.prefix = Prefix(model, self.roles, budget, candidates)
        run = PrefixMaskedForward if is_masked(model) else PrefixForward
        self.scorer = make_scorer(
            model,
            tokenizer,
            protocol=protocol,
            max_new_tokens=max_new_tokens,
            batch_tokens=batch_tokens,
            forward=run(model, self.prefix),
        )
        self.workers = workers_for(model)
        self.order, sizes = shuffled(examples, seed, max(1, protocol.unmasked_padding))
        self.sequential = protocol.unmasked_padding <= 1  # groups are no sample of examples
        self.stages = self._plan(sizes)

    def _largest(self, points: Sequence[Point]) -> list[Job]:
        jobs: dict[Any, Job] = {}
        for point in points:
            for job in self._jobs(point):
                if nests(job.compressor):
                    jobs[job.site, repr(job.compressor)] = job
        return list(jobs.values())

    def _jobs(self, point: Point) -> list[Job]:
        return plan_jobs(point.compressor, self.roles, point.layers)

    def _plan(self, sizes: Sequence[int]) -> list[list[Any]]:
        """Per stage its batches; each has a number of its own, under which activations are kept."""
        stages, start, key = [], 0, 0
        for size in sizes:
            batches = []
            for batch in self.scorer.plan(self.order[start : start + size]):
                batches.append(batch._replace(key=key) if isinstance(batch, CausalBatch) else batch)
                key += 1
            stages.append(batches)
            start += size
        return stages

    def __call__(
        self,
        point: Point | None,
        rival: Rival | None = None,
        *,
        level: float = 0.0,
        max_error: float | None = None,
    ) -> Found:
        """Examine a point, or the original model.

        Args:
            rival: the trial to beat; None: nothing is given up.
            level: with which probability a trial that would win may be given up.
            max_error: the relative error allowed.

        Raises:
            TooFar: the relative error is beyond `max_error`.
        """
        started = time.perf_counter()
        jobs = self._jobs(point) if point else []
        edits = self.bank.edits(jobs)
        error = max((edit.relative_error for edit in edits), default=0.0)
        if max_error is not None and error > max_error:
            raise TooFar(f"relative error {error:.3f}")
        rows, stopped = self._rows(edits, rival, level)
        ratio = ratio_of(jobs, self.roles) if jobs else 1.0
        saved = round(sum(self._size(job) for job in jobs) * (1 - 1 / ratio))
        return found_in(rows, stopped, ratio, saved, error, time.perf_counter() - started)

    def _size(self, job: Job) -> int:
        return sum(self.roles.geometry.inner(r) for _, r in job.site.matrices) * (
            self.roles.geometry.D
        )

    def _rows(
        self, edits: Sequence[Edit], rival: Rival | None, level: float
    ) -> tuple[list[Prediction], bool]:
        """Rows in the order of examination, and whether the trial was given up."""
        matrices = {matrix for edit in edits for matrix in edit.site.matrices}
        lowest = min((layer for layer, _ in matrices), default=None)
        ffn = any(layer == lowest and role in FFN for layer, role in matrices)
        race = Race(rival, len(self.order), level if self.sequential else 0.0) if rival else None
        place = {example.index: i for i, example in enumerate(self.order)}
        rows: list[Prediction] = []
        batches = [batch for stage in self.stages for batch in stage]
        with (
            edited(edits, self.roles, self.weights),
            self.prefix.editing(lowest, ffn=ffn),
            closing(score_all(self.scorer, batches, self.workers)) as scored,
        ):
            for stage in self.stages:
                new = [row for of_batch in islice(scored, len(stage)) for row in of_batch]
                new.sort(key=lambda row: place[row.index])
                rows += new
                given_up = race is not None and race.lost(
                    [row.correct for row in new], [row.loss for row in new]
                )
                if given_up and len(rows) < len(self.order):
                    return rows, True
        return rows, False


def shuffled(
    examples: Sequence[Example], seed: int, together: int
) -> tuple[list[Example], list[int]]:
    """The examples in random order, `together` neighbours kept as they are, and sizes of parts."""
    groups = [list(g) for _, g in groupby(examples, key=lambda e: e.index // together)]
    random.Random(seed).shuffle(groups)
    ends = [share * len(examples) for share in STAGES]
    sizes, done = [0], 0
    for group in groups:
        if sizes[-1] >= LEAST and done >= next(end for end in ends if end >= done - sizes[-1] + 1):
            sizes.append(0)
        sizes[-1] += len(group)
        done += len(group)
    return [example for group in groups for example in group], sizes
