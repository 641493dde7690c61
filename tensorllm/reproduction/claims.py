"""The paper's claim as a study: is an edit that was chosen on some questions better on others?

A cell is a dataset, a draw of validation rows and a method. The gradient guide orders the method's
edits, the first few are examined on the drawn rows, and the best one is told on the test rows,
which are the same for every cell and never among the drawn ones.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from tensorllm.checkpoint.loader import Loader
from tensorllm.compression.jobs import decomposed
from tensorllm.compression.plan import plan_jobs
from tensorllm.compressors import COMPRESSORS, Job
from tensorllm.data.base import ReasoningDataModule
from tensorllm.data.example import Example
from tensorllm.errors import Incomplete, UserError, first_line
from tensorllm.evaluation.protocol import PROTOCOLS
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.search.activation_cache import CacheBudget
from tensorllm.search.decompositions import Decompositions, ModelEdit, SiteEdit, edit_of_sites
from tensorllm.search.examiner import Examiner, Infeasible
from tensorllm.search.guide import Gradient, in_order, loss_gradient, predicted
from tensorllm.search.objectives import OBJECTIVES
from tensorllm.search.selection import optimism
from tensorllm.search.space import LAYER, Point, feasible, make_space
from tensorllm.search.stopping import Rival
from tensorllm.search.trial import TrialResult, unpack

PROTOCOL = "strict"
GOAL = OBJECTIVES["accuracy"]
LEVEL = 0.001  # probability with which the best trial may be pruned early, as in a search
GUIDED = 50  # validation rows of the gradient
EDITS_BYTES = 2**31  # of decomposed matrices that are kept for the next draw's gradient


@dataclass(frozen=True, slots=True)
class Method:
    """A row of the study.

    Attributes:
        settings: of the strategy, the same for every edit.
        points: how many edits of the grid, drawn at random, the guide ranks. Truncated SVDs of a
            matrix cost one decomposition for all ranks, Tucker decompositions one for each.
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


class Questions:
    """A dataset's rows: what is told (`test`), and what edits are chosen on (drawn from `pool`)."""

    def __init__(self, data: ReasoningDataModule, limit: int | None) -> None:
        self.name = data.name
        self.max_new_tokens = data.max_new_tokens
        self.test = data.part("test")[:limit]
        told = {example.index for example in self.test}
        self.pool = [e for e in data.part("all") if e.index not in told]
        if len({example.answer for example in self.pool}) < 2:
            raise UserError(f"every answer of {self.name} is {self.pool[0].answer!r}")

    def drawn(self, draw: int, count: int) -> list[Example]:
        """At most half of the pool, so that two draws differ."""
        count = min(count, len(self.pool) // 2)
        return random.Random(draw).sample(self.pool, count)

    def frequency(self) -> list[int]:
        """Of each test row's answer: how many rows of the pool have it, too."""
        counts = Counter(example.answer.lower() for example in self.pool)
        return [counts[example.answer.lower()] for example in self.test]


@dataclass(frozen=True, slots=True)
class Draw:
    """Drawn validation rows: what examines them, the original's result, the loss's gradient."""

    examiner: Examiner
    original: TrialResult
    gradient: Gradient


class Subject:
    """A model in memory, its edits, and the examiners of its questions.

    Args:
        budget: bytes of activations that each examiner may keep.
    """

    def __init__(self, loader: Loader, budget: CacheBudget) -> None:
        self.model = loader()
        self.tokenizer = loader.tokenizer()
        self.weights = parameters_of(self.model)
        self.roles = RoleMatrices(self.model.config, self.weights)
        self.budget = budget
        self._tests: dict[str, Examiner] = {}
        self._draws: dict[tuple[str, int], Draw] = {}
        self._sites: dict[tuple[Any, str], SiteEdit] = {}
        self._held = 0

    @cached_property
    def points(self) -> dict[str, list[Point] | str]:
        """The edits that the guide ranks, by method, or why the method is not for this model."""
        found: dict[str, list[Point] | str] = {}
        for method in METHODS:
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
        """What a job writes; kept, as every draw asks for it."""
        key = (job.site, repr(job.compressor))
        if key in self._sites:
            return self._sites[key]
        (edit,) = self._decompositions.edit([job]).sites
        size = sum(matrix.nbytes for matrix in edit.matrices)
        if self._held + size <= EDITS_BYTES:
            self._sites[key] = edit
            self._held += size
        return edit

    def _examiner(self, questions: Questions, examples: Sequence[Example]) -> Examiner:
        return Examiner(
            self.model,
            self.tokenizer,
            examples,
            PROTOCOLS[PROTOCOL],
            max_new_tokens=questions.max_new_tokens,
            points=self._every,
            budget=self.budget,
        )

    def draw(self, questions: Questions, number: int, count: int) -> Draw:
        """The rows of a draw; the last one is kept."""
        key = (questions.name, number)
        if key not in self._draws:
            self._draws.clear()
            examiner = self._examiner(questions, questions.drawn(number, count))
            matrices = {m for p in self._every for job in self._jobs(p) for m in job.site.matrices}
            gradient, _ = loss_gradient(examiner, frozenset(matrices), GUIDED)
            self._draws[key] = Draw(examiner, examiner(None), gradient)
        return self._draws[key]

    def told(self, questions: Questions, point: Point | None) -> dict[str, Any]:
        """The test rows' predictions after an edit (None: of the original)."""
        if questions.name not in self._tests:
            self._tests[questions.name] = self._examiner(questions, questions.test)
        edit = ModelEdit([], {})
        if point is not None:
            sites = decomposed(point.compressor, self.roles, self.weights, list(point.layers))
            edit = edit_of_sites(sites, self.roles)
        rows = self._tests[questions.name].predictions(edit)
        return {"predictions": [{**asdict(row), "prompt": ""} for row in rows]}

    def choose(self, draw: Draw, method: Method, trials: int) -> dict[str, Any]:
        """The best of the first edits in the guide's order, by the search's rule."""
        points = self.points[method.name]
        if isinstance(points, str):
            return {"refused": points}
        change = [
            predicted([self._site(job) for job in self._jobs(p)], draw.gradient, draw.examiner)
            for p in points
        ]
        order = in_order(change, [min(point.layers) for point in points])[:trials]
        tried: list[tuple[Point, TrialResult]] = []
        rows = []
        for n in order:
            point = points[n]
            row = {"point": point.recipe(), "predicted": change[n]}
            try:
                result = draw.examiner(point, _rival(tried), level=LEVEL)
            except (Infeasible, Incomplete, RuntimeError, ArithmeticError, UserError) as error:
                rows.append({**row, "failed": first_line(error)[:200]})
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


def _whole(tried: Sequence[tuple[Point, TrialResult]]) -> list[tuple[Point, TrialResult]]:
    return [(point, result) for point, result in tried if not result.stopped]


def _rival(tried: Sequence[tuple[Point, TrialResult]]) -> Rival | None:
    best = min((result for _, result in _whole(tried)), key=GOAL.order, default=None)
    return best and Rival(unpack(best.correct, best.seen), best.loss)
