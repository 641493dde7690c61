"""Progress of a pass through the layers, as a share of the time it will take."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from tensorllm.calibration.planned import Planned
from tensorllm.calibration.sequences import Batch
from tensorllm.progress import Progress

StageName = Literal["measuring layers", "fitting layers"]
MEASURING: Final = "measuring layers"
FITTING: Final = "fitting layers"
TELLING = 0.5  # share of a stage's first layer after which its time is extrapolated
PARTS = 100_000  # of the whole; progress is a share of time, not a count
# Cost of measuring in forward passes, and of decompositions at the model's width in multiply-adds
# over its cube, for curves and for factors (benchmarks/scaling_fit.py).
PASSES, CURVES, FACTORS = 3, 110, 90
TRIALS = 7  # runs of a layer on the held-out batch; runs of the FFN alone count in part


@dataclass(frozen=True, slots=True)
class Stage:
    """A number of layers that each take about the same time.

    Attributes:
        name: what is being done.
        layers: how many.
        work: of one layer, in a unit common to all stages; used to estimate stages that have not
            begun.
    """

    name: StageName
    layers: int
    work: float


def stages_ahead(
    planned: Planned,
    current: StageName,
    measured: Sequence[Batch],
    fitted: Sequence[Batch],
    *,
    alone: bool,
) -> list[Stage]:
    """The stages still to do of measuring and fitting.

    Args:
        planned: what is to be done.
        current: the stage that begins now.
        measured, fitted: their batches.
        alone: whether measuring is not followed by fitting.
    """
    trials = TRIALS * _tokens(measured[-1:]) * planned.holds_out
    measuring = _stage(planned, MEASURING, PASSES * _tokens(measured) + trials, CURVES)
    fitting = _stage(planned, FITTING, planned.passes * _tokens(fitted), FACTORS)
    if current == FITTING:
        return [fitting]
    return [measuring] if alone else [measuring, fitting]


def _tokens(batches: Sequence[Batch]) -> int:
    return sum(batch.count for batch in batches)


def _stage(planned: Planned, name: StageName, tokens: float, cubes: int) -> Stage:
    numbers = planned.numbers / len(planned.layers)
    return Stage(name, planned.layers[-1] + 1, tokens * numbers + cubes * planned.width**3)


@dataclass(slots=True)
class Forecast:
    """Reports progress such that extrapolating at the mean speed gives the expected time left.

    A layer is expected to take as long as the finished layers of its stage. If there are none, its
    time is its work at the speed so far; for the very first layer, the share of it that is done.
    What an earlier run finished counts by its work.

    Args:
        stages: in their order.
        tell: gets parts of `PARTS`.
        clock: in seconds.
    """

    stages: Sequence[Stage]
    tell: Progress
    clock: Callable[[], float] = time.monotonic
    _took: dict[int, list[float]] = field(default_factory=dict)
    _at: tuple[int, int] | None = None  # stage and layer
    _start: float = 0.0  # of this run
    _begun: float = 0.0  # the layer's
    _first: int = 0
    _reported: int = 0

    def goes_on(self, name: StageName, layer: int) -> bool:
        """Whether this layer comes after what was reported so far."""
        stages = [one.name for one in self.stages]
        return name in stages and (self._at is None or self._at < (stages.index(name), layer))

    def at(self, name: StageName, layer: int, share: float) -> None:
        """Report progress: this share of the passes of this layer is done."""
        stage = next(n for n, one in enumerate(self.stages) if one.name == name)
        now = self.clock()
        if self._at is None:
            self._start = self._begun = now
            self._first = self._reported = round(PARTS * self._done(stage, layer) / self._done())
        elif self._at != (stage, layer):
            self._took.setdefault(self._at[0], []).append(now - self._begun)
            self._begun = now
        self._at = stage, layer
        passed, left = now - self._start, self._left(stage, layer, min(share, 1.0), now)
        if passed > 0 and left is not None:
            here = self._first + int((PARTS - self._first) * passed / (passed + left))
            self._reported = max(self._reported, here)
        self.tell(self._reported, PARTS, name)

    def _done(self, stage: int | None = None, layer: int = 0) -> float:
        """Work before a layer; by default the total."""
        before = self.stages[:stage]
        return sum(one.work * one.layers for one in before) + (
            0.0 if stage is None else self.stages[stage].work * layer
        )

    def _left(self, stage: int, layer: int, share: float, now: float) -> float | None:
        """Seconds left; None if there is no basis for an estimate yet."""
        inside = now - self._begun
        work = sum(self.stages[n].work * len(took) for n, took in self._took.items())
        seconds = sum(map(sum, self._took.values()))
        if not work:
            work, seconds = self.stages[stage].work * share, inside
        if not work or not seconds:
            return None
        here = self._layer(stage, seconds / work)
        if stage not in self._took and share >= TELLING:
            here = max(here, inside / share)  # parts that were reported are not taken back
        of_this = max(here - inside, 0.0 if stage in self._took else here * (1 - share))
        layers = self.stages[stage].layers - layer - 1
        later = range(stage + 1, len(self.stages))
        return (
            of_this
            + here * layers
            + sum(self._layer(n, seconds / work) * self.stages[n].layers for n in later)
        )

    def _layer(self, stage: int, speed: float) -> float:
        """Seconds per layer of a stage."""
        took = self._took.get(stage)
        return sum(took) / len(took) if took else self.stages[stage].work * speed
