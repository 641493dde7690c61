"""The paper's claim as a study: does an edit chosen on some questions help on others?

A cell is a dataset, a draw of validation rows and a method. The gradient guide orders the method's
edits (`screening`), the first ones are screened by their loss on a few of the drawn rows, the best
of these are examined on all of them, and the winner is scored once on the test rows, which are the
same for every cell and never among the drawn ones.
"""

import math
import random
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tensorllm.checkpoint.loader import Loader
from tensorllm.compression.jobs import decomposed
from tensorllm.compression.plan import plan_jobs
from tensorllm.compressors import COMPRESSORS, Job
from tensorllm.data.base import ReasoningDataModule
from tensorllm.data.example import Example
from tensorllm.errors import Incomplete, UserError, first_line
from tensorllm.evaluation.predictions import Prediction
from tensorllm.evaluation.protocol import PROTOCOLS
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.search.activation_cache import CacheBudget
from tensorllm.search.decompositions import Decompositions, ModelEdit, SiteEdit, edit_of_sites
from tensorllm.search.examiner import Examiner, Infeasible
from tensorllm.search.feasible import feasible
from tensorllm.search.guide import LEAST, Gradient, loss_gradient, predicted
from tensorllm.search.objectives import OBJECTIVES
from tensorllm.search.prefix import default_budget
from tensorllm.search.selection import optimism
from tensorllm.search.space import LAYER, Point, make_space
from tensorllm.search.staged import DatasetExamples
from tensorllm.search.stopping import Rival, rivals_of
from tensorllm.search.trial import TrialResult

PROTOCOL = "strict"
GOAL = OBJECTIVES["accuracy"]
LEVEL = 0.001  # probability with which the best trial may be pruned early, as in a search
GUIDED = 50  # validation rows for the gradient
SCREENED = 4  # edits that are screened, for each one that is examined
SCREEN = 32  # rows for the screening
EDITS_BYTES = 2**31  # of decomposed matrices that are kept for the next draw's gradient


@dataclass(frozen=True, slots=True)
class Method:
    """A method of the study.

    Attributes:
        name: in the results.
        mode: the compressor's name.
        settings: of the strategy, the same for every edit.
        points: how many edits of the grid, drawn at random, the guide ranks. Truncated SVDs of a
            matrix need one decomposition for all ranks, Tucker decompositions one for each.
    """

    name: str
    mode: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    points: int = 60


METHODS = (
    Method("laser", "laser", points=400),
    Method("shared-tucker, paper", "shared-tucker", {"layout": "paper"}),
    Method("shared-tucker, official", "shared-tucker", {"layout": "official"}),
    Method("per-matrix-tucker", "per-matrix-tucker", {"layout": "paper"}),
    Method("hybrid", "hybrid", {"layout": "paper"}),
)


class StudyDataset:
    """A dataset's rows: `test` scores winners; rows to choose edits on are drawn from `pool`."""

    def __init__(self, data: ReasoningDataModule, limit: int | None) -> None:
        self.name = str(data.name)
        self.max_new_tokens = data.max_new_tokens
        self.test = data.part("test")[:limit]
        tested = {example.index for example in self.test}
        self.pool = [e for e in data.part("all") if e.index not in tested]
        if len({example.answer for example in self.pool}) < 2:
            raise UserError(f"every answer of {self.name} is {self.pool[0].answer!r}")

    def drawn(self, draw: int, count: int) -> list[Example]:
        """Draw `count` rows of the pool, but at most half of it, so that two draws differ."""
        count = min(count, len(self.pool) // 2)
        if count < LEAST:
            raise UserError(
                f"an edit is chosen on {LEAST} rows or more, got {count} of {self.name}: half of "
                "what --limit leaves, at most --validation"
            )
        return random.Random(draw).sample(self.pool, count)

    def frequency(self) -> list[int]:
        """For each test row, how many rows of the pool have the same answer."""
        counts = Counter(example.answer.lower() for example in self.pool)
        return [counts[example.answer.lower()] for example in self.test]


@dataclass(frozen=True, slots=True)
class Draw:
    """Drawn validation rows.

    Attributes:
        examiner: examines edits on all of them.
        screen: examines edits on the first of them.
        original: the original model's result.
        gradient: of the loss.
    """

    examiner: Examiner
    screen: Examiner
    original: TrialResult
    gradient: Gradient


class StudyModel:
    """A model in memory, its edits, and the examiners of its questions.

    Args:
        loader: loads the model.
        methods: make the edits.
        examiners: the most that exist at once; they share the memory for activations.
    """

    def __init__(self, loader: Loader, methods: Sequence[Method], examiners: int) -> None:
        self.model = loader()
        self.methods = methods
        self.tokenizer = loader.tokenizer()
        self.weights = parameters_of(self.model)
        self.roles = RoleMatrices(self.model.config, self.weights)
        memory = default_budget(self.model.device) // examiners
        self.budget = CacheBudget(memory, 0, Path(tempfile.gettempdir()))
        self._tests: dict[str, Examiner] = {}
        self._draws: dict[tuple[str, int], Draw] = {}
        self._sites: dict[tuple[Any, str], SiteEdit] = {}
        self._held = 0

    @cached_property
    def points(self) -> dict[str, list[Point] | str]:
        """The edits that the guide ranks, by method, or why the method does not fit this model."""
        found: dict[str, list[Point] | str] = {}
        for method in self.methods:
            try:
                found[method.name] = self._points(method)
            except UserError as error:
                found[method.name] = first_line(error)
        return found

    def _points(self, method: Method) -> list[Point]:
        there = COMPRESSORS[method.mode].search_space(self.roles.spec, method.settings)
        named = {name: what.names for name, what in there.items() if what.names}
        space = make_space(self.roles, method.mode, values=named, fixed=method.settings)
        values = feasible(space, self.roles, min_ratio=1)
        chosen = random.Random(0).sample(values, min(method.points, len(values)))
        return [space.point(one) for one in sorted(chosen, key=lambda one: -int(one[LAYER]))]

    @cached_property
    def _every(self) -> list[Point]:
        return [p for points in self.points.values() if not isinstance(points, str) for p in points]

    @cached_property
    def _decompositions(self) -> Decompositions:
        return Decompositions(
            self.roles, self.weights, [job for p in self._every for job in self._jobs(p)]
        )

    def _jobs(self, point: Point) -> list[Job]:
        return plan_jobs(point.compressor, self.roles, point.layers)

    def _site(self, job: Job) -> SiteEdit:
        """What a job writes; cached, as every draw asks for it."""
        key = (job.site, repr(job.compressor))
        if key in self._sites:
            return self._sites[key]
        (edit,) = self._decompositions.edit([job]).sites
        size = sum(matrix.nbytes for matrix in edit.matrices)
        if self._held + size <= EDITS_BYTES:
            self._sites[key] = edit
            self._held += size
        return edit

    def _examiner(self, questions: StudyDataset, examples: Sequence[Example]) -> Examiner:
        return Examiner(
            self.model,
            self.tokenizer,
            [DatasetExamples(examples, questions.max_new_tokens)],
            PROTOCOLS[PROTOCOL],
            points=self._every,
            budget=self.budget,
        )

    def draw(self, questions: StudyDataset, number: int, count: int) -> Draw:
        """The examined rows of a draw; the last draw is cached."""
        key = (questions.name, number)
        if key not in self._draws:
            self._draws.clear()
            rows = questions.drawn(number, count)
            examiner = self._examiner(questions, rows)
            screen = self._examiner(questions, rows[:SCREEN])
            matrices = {m for p in self._every for job in self._jobs(p) for m in job.site.matrices}
            gradient, _ = loss_gradient(examiner, frozenset(matrices), GUIDED)
            self._draws[key] = Draw(examiner, screen, examiner(None), gradient)
        return self._draws[key]

    def on_test(self, questions: StudyDataset, point: Point | None) -> dict[str, Any]:
        """The predictions on the test rows under an edit; None: of the original."""
        if questions.name not in self._tests:
            self._tests[questions.name] = self._examiner(questions, questions.test)
        edit = ModelEdit([], {})
        if point is not None:
            sites = decomposed(point.compressor, self.roles, self.weights, list(point.layers))
            edit = edit_of_sites(sites, self.roles)
        rows = self._tests[questions.name].predictions(edit)
        return {"predictions": [{**asdict(row), "prompt": ""} for row in rows]}

    def _screened(
        self, draw: Draw, points: Sequence[Point], edits: Sequence[ModelEdit], count: int
    ) -> list[int]:
        """The `count` edits, by index, with the least loss among the guide's first ones."""
        change = [predicted(edit.sites, draw.gradient, draw.examiner) for edit in edits]
        size = [sum(site.relative_error**2 for site in edit.sites) ** 0.5 for edit in edits]
        order = screening(change, size, [min(point.layers) for point in points])
        first = order[: SCREENED * count]
        loss = {n: loss_of(draw.screen.predictions(edits[n])) for n in first}
        return sorted(first, key=lambda n: (not math.isfinite(loss[n]), loss[n]))[:count]

    def choose(self, draw: Draw, method: Method, trials: int) -> dict[str, Any]:
        """The best of the first edits in the guide's order, by the search's rule."""
        points = self.points[method.name]
        if isinstance(points, str):
            return {"refused": points}
        edits = [ModelEdit([self._site(job) for job in self._jobs(p)], {}) for p in points]
        order = self._screened(draw, points, edits, trials)
        tried: list[tuple[Point, TrialResult]] = []
        rows = []
        for n in order:
            point = points[n]
            row = {"point": point.recipe()}
            try:
                result = draw.examiner(point, _rivals(tried), level=LEVEL)
            except (Infeasible, Incomplete, RuntimeError, ArithmeticError, UserError) as error:
                rows.append({**row, "failed": first_line(error)})
                continue
            tried.append((point, result))
            rows.append({**row, **result.to_json()})
        found = _whole(tried)
        if not found:
            return {"refused": f"none of {len(order)} edits could be examined", "trials": rows}
        best, result = min(found, key=lambda pair: GOAL.order(pair[1]))
        return {
            "point": asdict(best),
            "original": draw.original.to_json(),
            "winner": result.to_json(),
            "selection": optimism([r for _, r in found], draw.original, seed=0),
            "trials": rows,
            "points": len(points),
        }


def screening(change: Sequence[float], size: Sequence[float], layers: Sequence[int]) -> list[int]:
    """The order in which edits are screened, as indices.

    The predicted change is of first order, so the largest edits, which break a model, have the
    largest predictions. Two orders alternate: by the predicted change, and by the change relative
    to the edit's size (the share of the weights that it changes). In each, every layer's best edit
    comes before any layer's second.
    """
    by_change = _layer_by_layer(change, layers)
    relative = [c / (s or 1.0) for c, s in zip(change, size, strict=True)]
    both = zip(by_change, _layer_by_layer(relative, layers), strict=True)
    return list(dict.fromkeys(n for pair in both for n in pair))


def _layer_by_layer(values: Sequence[float], layers: Sequence[int]) -> list[int]:
    """Indices in ascending order, every layer's least value first, then every layer's second."""
    before: Counter[int] = Counter()
    ranks = {}
    for n in sorted(range(len(values)), key=lambda n: values[n]):
        ranks[n] = before[layers[n]], values[n]
        before[layers[n]] += 1
    return sorted(ranks, key=lambda n: ranks[n])


def loss_of(rows: Sequence[Prediction]) -> float:
    """The loss that the guide predicts: cross-entropy among choices, or nats per token."""
    losses = []
    for row in rows:
        of_choices = row.choice_log_probabilities
        total = float(np.logaddexp.reduce(of_choices)) if of_choices else 0.0
        losses.append(total - row.log_probability if of_choices else row.loss)
    return sum(losses) / len(losses)


def _whole(tried: Sequence[tuple[Point, TrialResult]]) -> list[tuple[Point, TrialResult]]:
    return [(point, result) for point, result in tried if not result.stopped]


def _rivals(tried: Sequence[tuple[Point, TrialResult]]) -> list[Rival]:
    best = min((result for _, result in _whole(tried)), key=GOAL.order, default=None)
    return [] if best is None else rivals_of(best, "verdicts")
