"""Examine a point: write its weights, ask the validation questions, restore the weights."""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cached_property
from itertools import count, islice, zip_longest

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tensorllm.calibration.fit import Fitted, fit
from tensorllm.calibration.sequences import Calibration
from tensorllm.compression.plan import plan_jobs
from tensorllm.compressors import Job
from tensorllm.errors import UserError
from tensorllm.evaluation.predictions import Prediction
from tensorllm.evaluation.protocol import Protocol
from tensorllm.evaluation.scorer import (
    CausalModelScorer,
    is_masked,
    make_scorer,
    score_all,
    workers_for,
)
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.search.activation_cache import NO_CACHE, CacheBudget
from tensorllm.search.decompositions import Decompositions, ModelEdit, applied, edit_of_fit
from tensorllm.search.forwards import PrefixForward, PrefixMaskedForward
from tensorllm.search.lanes import changed_by, changed_names, rowwise
from tensorllm.search.prefix import EditExtent, Prefix
from tensorllm.search.space import Point
from tensorllm.search.staged import DatasetExamples, PerDatasetScorer, StagedExamples
from tensorllm.search.stopping import Race, Rival
from tensorllm.search.trial import EditSizes, TrialResult, result_of, together
from tensorllm.tensors.stacking import FEED_FORWARD, family

# Most trials examined at once, and most tokens of one batch over all of them: their key-value
# caches are in memory at the same time.
LANES = 16
LANE_TOKENS = 2**14


class Infeasible(Exception):
    """The decomposition's relative error, or its size, exceeds what is allowed."""


class Examiner:
    """Scores points on the validation examples with one model, edited in place.

    Args:
        model: unedited, in eval mode.
        tokenizer: its tokenizer.
        asked: the validation part of each dataset; they share the memory for activations.
        protocol: decides which answers are right.
        points: all that may be asked for; they determine how large the decompositions must be.
        calibration: the text, for a strategy that is fitted to one.
        seed: of the order of the examples.
        budget: for activations below the edited layer.
        batch_tokens: tokens per batch; None: what suits the device.

    Raises:
        UserError: a strategy needs a calibration text, and there is none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        asked: Sequence[DatasetExamples],
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
            StagedExamples(
                examples,
                make_scorer(
                    model,
                    tokenizer,
                    protocol=protocol,
                    max_new_tokens=max_new_tokens,
                    batch_tokens=batch_tokens,
                    forward=self.forward,
                ),
                max_new_tokens,
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
        """Examine a point; None: the original model.

        Args:
            rivals: what the trial has to beat on each dataset; empty: nothing is pruned.
            level: probability with which a trial that would win may be pruned, over all datasets
                together.
            max_error: the largest relative error allowed.
            min_ratio: the least ratio of numbers in the matrices to numbers stored for them.

        Raises:
            Infeasible: the relative error is above `max_error`, or the ratio below `min_ratio`.
        """
        (found,) = self.together(
            [point], [rivals], level=level, max_error=max_error, min_ratio=min_ratio
        )
        if isinstance(found, Infeasible):
            raise found
        return found

    def together(
        self,
        points: Sequence[Point | None],
        rivals: Sequence[Sequence[Rival]],
        *,
        level: float = 0.0,
        max_error: float | None = None,
        min_ratio: float = 0.0,
    ) -> list[TrialResult | Infeasible]:
        """Examine several points at once, at most `side_by_side`: the same results in less time.

        Args:
            rivals: of each point.
            level, max_error, min_ratio: as for one point.
        """
        started = time.perf_counter()
        edits = [self.edit(point) for point in points]
        refused = [refusal(edit, max_error, min_ratio) for edit in edits]
        tried = [n for n, reason in enumerate(refused) if reason is None]
        rows = self._rows([edits[n] for n in tried], [rivals[n] for n in tried], level)
        seconds = (time.perf_counter() - started) / max(1, len(tried))
        found = dict(zip(tried, rows, strict=True))
        out: list[TrialResult | Infeasible] = []
        for n, (edit, reason) in enumerate(zip(edits, refused, strict=True)):
            if reason is not None:
                out.append(Infeasible(reason))
                continue
            of_parts, stopped = found[n]
            out.append(
                together([result_of(rows, stopped, sizes(edit), seconds) for rows in of_parts])
            )
        return out

    @cached_property
    def side_by_side(self) -> int:
        """How many points are best examined at once.

        More than one where answers are generated: decoding one token for a single point is too
        little work to use the device well.
        """
        asked = all(isinstance(part.scorer, CausalModelScorer) for part in self.parts)
        generated = [
            len(batch.items) * (max(item.length for item in batch.items) + part.max_new_tokens)
            for part, stage in self.stages
            for batch in stage
            if asked and not batch.items[0].example.choices and not batch.items[0].example.tokens
        ]
        if not generated or self.calibration is not None:
            return 1
        return max(1, min(LANES, LANE_TOKENS // max(generated)))

    def predictions(self, edit: ModelEdit) -> list[Prediction]:
        """The predictions of every example under an edit, dataset after dataset, in their order."""
        ((rows, _),) = self._rows([edit], [()], 0.0)
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
        if point.key not in self._fitted:  # the winner is asked for again
            self._fitted = {
                point.key: fit(point.compressor, self.model, self.calibration, point.layers)
            }
        return self._fitted[point.key]

    def _rows(
        self, edits: Sequence[ModelEdit], rivals: Sequence[Sequence[Rival]], level: float
    ) -> list[tuple[list[list[Prediction]], bool]]:
        """For each edit its rows per dataset, in order of examination, and whether it was pruned.

        The datasets take turns, stage by stage; a trial that has lost on any of them is pruned.
        """
        if not edits:
            return []
        if not self._can_be_side_by_side(edits):
            pairs = zip(edits, rivals, strict=True)
            return [found for e, r in pairs for found in self._rows([e], [r], level)]
        races = [self._races(of_edit, level) for of_edit in rivals]
        rows: list[dict[StagedExamples, list[Prediction]]] = [
            {p: [] for p in self.parts} for _ in edits
        ]
        stopped = [False] * len(edits)
        going = dict.fromkeys(range(len(edits)))
        batches = [(part, batch) for part, stage in self.stages for batch in stage]
        left = len(self.stages)
        with (
            self._applied(edits),
            self.prefix.editing(*map(self._edited, edits)),
            closing(score_all(PerDatasetScorer(going), batches, self.workers)) as scored,
        ):
            for part, stage in self.stages:
                of_batches = list(islice(scored, len(stage)))
                left -= 1
                for lane in list(going):
                    new = part.in_order([row for batch in of_batches for row in batch[lane]])
                    rows[lane][part] += new
                    lost = part in races[lane] and races[lane][part].lost(
                        [row.correct for row in new], [row.loss for row in new]
                    )
                    if lost and left:
                        stopped[lane] = True
                        del going[lane]
                if not going:
                    break
        return [(list(r.values()), pruned) for r, pruned in zip(rows, stopped, strict=True)]

    def _can_be_side_by_side(self, edits: Sequence[ModelEdit]) -> bool:
        if len(edits) < 2:
            return True
        return self.side_by_side > 1 and all(
            rowwise(changed_names(edit, self.roles), self.model) for edit in edits
        )

    @contextmanager
    def _applied(self, edits: Sequence[ModelEdit]) -> Iterator[None]:
        """Write a single edit into the model's weights; install several as lanes beside them."""
        if len(edits) == 1:
            with applied(edits[0], self.roles, self.weights):
                yield
            return
        assert isinstance(self.forward, PrefixForward), "masked models run one edit at a time"
        changed = [changed_by(edit, self.roles, self.weights) for edit in edits]
        with self.forward.weights.installed(changed):
            yield

    def _edited(self, edit: ModelEdit) -> EditExtent:
        matrices = {matrix for site in edit.sites for matrix in site.site.matrices}
        lowest = min((layer for layer, _ in matrices), default=None)
        ffn = any(layer == lowest and family(role) in FEED_FORWARD for layer, role in matrices)
        return EditExtent(lowest, ffn or bool(edit.parameters))

    def _races(self, rivals: Sequence[Rival], level: float) -> dict[StagedExamples, Race]:
        """One race per dataset; the tests share the level, so that together they keep it."""
        if not rivals:
            return {}
        share = level / len(self.parts)
        return {
            part: Race(rival, len(part.order), share if part.sequential else 0.0)
            for part, rival in zip(self.parts, rivals, strict=True)
        }


def sizes(edit: ModelEdit) -> EditSizes:
    """The sizes and the relative error of an edit."""
    before, after = sum(s.before for s in edit.sites), sum(s.after for s in edit.sites)
    error = max((site.relative_error for site in edit.sites), default=0.0)
    return EditSizes(before / after if after else 1.0, before - after, error)


def refusal(edit: ModelEdit, max_error: float | None, min_ratio: float) -> str | None:
    """Why an edit is not tried; None: it is tried."""
    found = sizes(edit)
    if max_error is not None and found.relative_error > max_error:
        return f"relative error {found.relative_error:.3f}, more than allowed"
    return too_large(found.ratio, min_ratio) if found.ratio < min_ratio else None


def too_large(ratio: float, least: float) -> str:
    """Why a point with this ratio is not tried."""
    if least == 1:
        return (
            f"its factors would hold more numbers than the matrices (ratio {ratio:.3g}); "
            "--min-ratio 0 tries it"
        )
    return f"ratio {ratio:.3g}, less than {least:g}"
