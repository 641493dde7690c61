"""Examining one point: its weights written, validation questions asked, weights restored."""

import time
from collections.abc import Sequence
from contextlib import closing
from itertools import count, islice, zip_longest

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tensorllm.calibration.fit import Fitted, fit
from tensorllm.calibration.sequences import Calibration
from tensorllm.compression.plan import plan_jobs
from tensorllm.compressors import Job
from tensorllm.errors import UserError
from tensorllm.evaluation.predictions import Prediction
from tensorllm.evaluation.protocol import Protocol
from tensorllm.evaluation.scorer import is_masked, make_scorer, score_all, workers_for
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.search.activation_cache import NO_CACHE, CacheBudget
from tensorllm.search.decompositions import Decompositions, ModelEdit, applied, edit_of_fit
from tensorllm.search.parts import Asked, ByPart, Part
from tensorllm.search.prefix import Prefix, PrefixForward, PrefixMaskedForward
from tensorllm.search.space import Point
from tensorllm.search.stopping import Race, Rival
from tensorllm.search.trial import Sizes, TrialResult, result_of, together
from tensorllm.tensors.stacking import FEED_FORWARD, family


class Infeasible(Exception):
    """The decomposition's relative error, or its size, is beyond what was allowed."""


class Examiner:
    """Scores points on the validation examples with one model, in place.

    Args:
        model: unedited, in eval mode.
        tokenizer: its tokenizer.
        asked: of each dataset the validation part; they share the memory for activations.
        protocol: what counts as right.
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
        asked: Sequence[Asked],
        protocol: Protocol,
        *,
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
        self.workers = workers_for(model)
        keys = count()
        self.parts = [
            Part(
                examples,
                make_scorer(
                    model,
                    tokenizer,
                    protocol=protocol,
                    max_new_tokens=max_new_tokens,
                    batch_tokens=batch_tokens,
                    forward=self.forward,
                ),
                protocol,
                keys,
                seed,
            )
            for examples, max_new_tokens in asked
        ]
        of_parts = ([(part, stage) for stage in part.stages] for part in self.parts)
        self.stages = [stage for at in zip_longest(*of_parts) for stage in at if stage is not None]

    def jobs(self, point: Point) -> list[Job]:
        return plan_jobs(point.compressor, self.roles, point.layers)

    def __call__(
        self,
        point: Point | None,
        rivals: Sequence[Rival] = (),
        *,
        level: float = 0.0,
        max_error: float | None = None,
        min_ratio: float = 0.0,
    ) -> TrialResult:
        """Examine a point, or the original model.

        Args:
            rivals: on each dataset what the trial has to beat; none: nothing is pruned.
            level: with which probability a trial that would win may be pruned, whichever dataset
                it is pruned on.
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
        rows, stopped = self._rows(edit, rivals, level)
        seconds = time.perf_counter() - started
        sizes = Sizes(ratio, before - after, error)
        return together([result_of(each, stopped, sizes, seconds) for each in rows])

    def predictions(self, edit: ModelEdit) -> list[Prediction]:
        """Every example's with an edit, dataset after dataset, in its order."""
        rows, _ = self._rows(edit, (), 0.0)
        return [row for of_part in rows for row in sorted(of_part, key=lambda row: row.index)]

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
        self, edit: ModelEdit, rivals: Sequence[Rival], level: float
    ) -> tuple[list[list[Prediction]], bool]:
        """Per dataset its rows in the order of examination, and whether the trial was pruned.

        Stage after stage of one dataset and the other: a trial that has lost on any is pruned.
        """
        matrices = {matrix for site in edit.sites for matrix in site.site.matrices}
        lowest = min((layer for layer, _ in matrices), default=None)
        ffn = any(layer == lowest and family(role) in FEED_FORWARD for layer, role in matrices)
        ffn |= bool(edit.parameters)
        races = self._races(rivals, level)
        rows: dict[Part, list[Prediction]] = {part: [] for part in self.parts}
        batches = [(part, batch) for part, stage in self.stages for batch in stage]
        left = len(self.stages)
        with (
            applied(edit, self.roles, self.weights),
            self.prefix.editing(lowest, ffn=ffn),
            closing(score_all(ByPart(), batches, self.workers)) as scored,
        ):
            for part, stage in self.stages:
                new = [row for of_batch in islice(scored, len(stage)) for row in of_batch]
                new = part.in_order(new)
                rows[part] += new
                left -= 1
                lost = part in races and races[part].lost(
                    [row.correct for row in new], [row.loss for row in new]
                )
                if lost and left:
                    return list(rows.values()), True
        return list(rows.values()), False

    def _races(self, rivals: Sequence[Rival], level: float) -> dict[Part, Race]:
        """Each test has its share of the level, so that together they keep it."""
        if not rivals:
            return {}
        share = level / len(self.parts)
        return {
            part: Race(rival, len(part.order), share if part.sequential else 0.0)
            for part, rival in zip(self.parts, rivals, strict=True)
        }


def too_large(ratio: float, least: float) -> str:
    """Why a point with this ratio is not tried."""
    if least == 1:
        return (
            f"its factors would hold more numbers than the matrices (ratio {ratio:.3g}); "
            "--min-ratio 0 tries it"
        )
    return f"ratio {ratio:.3g}, less than {least:g}"
