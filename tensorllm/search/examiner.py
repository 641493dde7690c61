"""Examining one point: its weights written, validation questions asked, weights restored."""

import random
import time
from collections.abc import Sequence
from contextlib import closing
from itertools import groupby, islice
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tensorllm.calibration.fit import Fitted, fit
from tensorllm.calibration.sequences import Calibration
from tensorllm.compression.plan import plan_jobs
from tensorllm.compressors import Job
from tensorllm.data.example import Example
from tensorllm.errors import UserError
from tensorllm.evaluation.causal import CausalBatch
from tensorllm.evaluation.predictions import Prediction
from tensorllm.evaluation.protocol import Protocol
from tensorllm.evaluation.scorer import is_masked, make_scorer, score_all, workers_for
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.search.activation_cache import NO_CACHE, CacheBudget
from tensorllm.search.decompositions import Decompositions, ModelEdit, applied, edit_of_fit
from tensorllm.search.prefix import Prefix, PrefixForward, PrefixMaskedForward
from tensorllm.search.space import Point
from tensorllm.search.stopping import Race, Rival
from tensorllm.search.trial import TrialResult, result_of
from tensorllm.tensors.stacking import FEED_FORWARD, family

# After each of these shares of the validation set a losing trial may be pruned. More of them
# would make batches small, which costs more than it saves.
STAGES = (1 / 8, 1 / 4, 1 / 2, 1)
LEAST = 32  # examples in a stage


class Infeasible(Exception):
    """The decomposition's relative error, or its size, is beyond what was allowed."""


class Examiner:
    """Scores points on the validation examples with one model, in place.

    Args:
        model: unedited, in eval mode.
        tokenizer: its tokenizer.
        examples: of the validation part.
        protocol: what counts as right.
        max_new_tokens: how long a generated answer may be.
        points: all that may be asked for; they say how large the decompositions must be.
        calibration: the text, for a strategy that is fitted to one.
        seed: of the order of the examples.
        budget: for activations below the edited layer.
        batch_tokens: tokens of a batch; None: what suits the device.

    Raises:
        UserError: a strategy is fitted to a text, and there is none.
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
        calibration: Calibration | None = None,
        seed: int = 0,
        budget: CacheBudget = NO_CACHE,
        batch_tokens: int | None = None,
    ) -> None:
        self.model = model
        self.weights = parameters_of(model)
        self.roles = RoleMatrices(model.config, self.weights)
        self.calibration = calibration
        self._fitted: dict[str, Fitted] = {}
        jobs = [job for point in points for job in self.jobs(point)]
        if calibration is None and any(job.compressor.needs != "weights" for job in jobs):
            raise UserError(
                f"mode {points[0].mode!r} is fitted to text: give --calibration FILE "
                "(calibration= in Python)"
            )
        self.decompositions = Decompositions(self.roles, self.weights, jobs)
        candidates = {min(point.layers) for point in points}
        self.prefix = Prefix(model, self.roles, budget, candidates)
        run = PrefixMaskedForward if is_masked(model) else PrefixForward
        self.forward = run(model, self.prefix)
        self.scorer = make_scorer(
            model,
            tokenizer,
            protocol=protocol,
            max_new_tokens=max_new_tokens,
            batch_tokens=batch_tokens,
            forward=self.forward,
        )
        self.workers = workers_for(model)
        self.order, sizes = shuffled(examples, seed, max(1, protocol.unmasked_padding))
        self.sequential = protocol.unmasked_padding <= 1  # groups are no sample of examples
        self.stages = self._plan(sizes)

    def jobs(self, point: Point) -> list[Job]:
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
        min_ratio: float = 0.0,
    ) -> TrialResult:
        """Examine a point, or the original model.

        Args:
            rival: the trial to beat; None: nothing is pruned.
            level: with which probability a trial that would win may be pruned.
            max_error: the relative error allowed.
            min_ratio: of the numbers in the matrices to those stored.

        Raises:
            Infeasible: the relative error is beyond `max_error`, or the ratio less than asked.
        """
        started = time.perf_counter()
        edit = self.edit(point)
        error = max((site.relative_error for site in edit.sites), default=0.0)
        if max_error is not None and error > max_error:
            raise Infeasible(f"relative error {error:.3f}, more than allowed")
        before, after = sum(s.before for s in edit.sites), sum(s.after for s in edit.sites)
        ratio = before / after if after else 1.0
        if ratio < min_ratio:
            raise Infeasible(too_large(ratio, min_ratio))
        rows, stopped = self._rows(edit, rival, level)
        seconds = time.perf_counter() - started
        return result_of(rows, stopped, ratio, before - after, error, seconds)

    def predictions(self, edit: ModelEdit) -> list[Prediction]:
        """Every example's with an edit, in the order of the dataset."""
        rows, _ = self._rows(edit, None, 0.0)
        return sorted(rows, key=lambda row: row.index)

    def edit(self, point: Point | None) -> ModelEdit:
        """What the point changes in the model; None: nothing."""
        if point is None:
            return ModelEdit([], {})
        jobs = self.jobs(point)
        if all(job.compressor.needs == "weights" for job in jobs):
            return self.decompositions.edit(jobs)
        return edit_of_fit(self.fitted(point), self.roles, self.weights)

    def fitted(self, point: Point) -> Fitted:
        """The point's strategy, fitted to the calibration text."""
        assert self.calibration is not None, "a strategy without a text was refused"
        if point.key not in self._fitted:  # the winner's is wanted again
            self._fitted = {
                point.key: fit(point.compressor, self.model, self.calibration, point.layers)
            }
        return self._fitted[point.key]

    def _rows(
        self, edit: ModelEdit, rival: Rival | None, level: float
    ) -> tuple[list[Prediction], bool]:
        """Rows in the order of examination, and whether the trial was pruned."""
        matrices = {matrix for site in edit.sites for matrix in site.site.matrices}
        lowest = min((layer for layer, _ in matrices), default=None)
        ffn = any(layer == lowest and family(role) in FEED_FORWARD for layer, role in matrices)
        ffn |= bool(edit.parameters)
        race = Race(rival, len(self.order), level if self.sequential else 0.0) if rival else None
        place = {example.index: i for i, example in enumerate(self.order)}
        rows: list[Prediction] = []
        batches = [batch for stage in self.stages for batch in stage]
        with (
            applied(edit, self.roles, self.weights),
            self.prefix.editing(lowest, ffn=ffn),
            closing(score_all(self.scorer, batches, self.workers)) as scored,
        ):
            for stage in self.stages:
                new = [row for of_batch in islice(scored, len(stage)) for row in of_batch]
                new.sort(key=lambda row: place[row.index])
                rows += new
                lost = race is not None and race.lost(
                    [row.correct for row in new], [row.loss for row in new]
                )
                if lost and len(rows) < len(self.order):
                    return rows, True
        return rows, False


def too_large(ratio: float, least: float) -> str:
    """Why a point with this ratio is not tried."""
    if least == 1:
        return (
            f"its factors would hold more numbers than the matrices (ratio {ratio:.3g}); "
            "--min-ratio 0 tries it"
        )
    return f"ratio {ratio:.3g}, less than {least:g}"


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
