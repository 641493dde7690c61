"""When a trial is pruned: it has lost, for certain or at a stated error level.

The validation examples are examined in a random order, so those seen so far are a sample without
replacement. Two rules, both against one trial that was examined in full, the rival (over several
datasets, where the worst change counts, against what a trial must reach on each of them to win):

- certain: even if all remaining answers were right (loss 0), the trial would end below the rival;
- betting: a test martingale for "the trial ends at least as well as the rival", on the paired
  differences of verdicts. Source: Waudby-Smith and Ramdas, "Estimating means of bounded random
  variables by betting", JRSS B 2024, section 5 (sampling without replacement).

If the hypothesis is true, the martingale ever exceeds 1 / level with probability at most `level`
(Ville's inequality). So the trial that is best on all validation examples is pruned with
probability at most `level`, however many trials there are: only its own test, against the one
rival it met, can be wrong about it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tensorllm.search.trial import TrialResult, unpack

ROUNDING = 1e-6  # in answers: `spare` is computed from percentages


@dataclass(frozen=True, slots=True)
class Rival:
    """The trial to beat, examined in full.

    Attributes:
        correct: its verdicts, in the order of examination; None: compare losses.
        loss: its mean loss, in nats per token.
        spare: how many right answers fewer than the rival's still count as equal. Over several
            datasets only the rival's worst one decides, so it has answers to spare on the others.
    """

    correct: tuple[bool, ...] | None
    loss: float
    spare: float = 0.0


def rivals_of(
    best: TrialResult, by: Literal["verdicts", "loss"], original: TrialResult | None = None
) -> list[Rival]:
    """What a trial has to reach on each dataset to be as good as `best`.

    Over several datasets a trial is ranked by its worst change from the original: it has lost as
    soon as one dataset cannot reach the best trial's worst change.
    """
    if original is None or not best.parts:
        return [Rival(unpack(best.correct, best.seen) if by == "verdicts" else None, best.loss)]
    pairs = [(b, o) for b, o in zip(best.parts, original.parts, strict=True) if b and o]
    if by == "loss":
        worst = max(b.loss - o.loss for b, o in pairs)
        return [Rival(None, o.loss + worst) for _, o in pairs]
    gains = [(b.accuracy or 0.0) - (o.accuracy or 0.0) for b, o in pairs]
    return [
        Rival(unpack(b.correct, b.seen), b.loss, (gain - min(gains)) * b.seen / 100)
        for (b, _), gain in zip(pairs, gains, strict=True)
    ]


@dataclass(slots=True)
class Race:
    """One trial against its rival, example by example.

    Args:
        rival: the trial to beat.
        total: validation examples.
        level: probability with which a trial that would win is pruned; 0: only when certain.
    """

    rival: Rival
    total: int
    level: float
    seen: int = 0
    right: int = 0
    nats: float = 0.0
    behind: int = 0  # sum of the rival's verdicts minus the trial's
    _spread: float = 0.0  # sum of the squared differences
    _log_wealth: float = 0.0

    def lost(self, correct: Sequence[bool | None], losses: Sequence[float]) -> bool:
        """Add the next examples; returns whether the trial can be pruned now."""
        found = False
        for verdict, loss in zip(correct, losses, strict=True):
            found = self._next(bool(verdict), loss) or found
        return found or self._certain()

    def _next(self, verdict: bool, loss: float) -> bool:
        rival = self.rival.correct
        out = False
        if rival is not None:
            out = self._bet(int(rival[self.seen]) - int(verdict))
        self.seen += 1
        self.right += verdict
        self.nats += loss
        return out

    def _bet(self, difference: int) -> bool:
        """Multiply in one factor of the martingale; the stake depends on earlier examples only."""
        left = self.total - self.seen
        fair = (self.rival.spare - self.behind) / left  # expected next difference if both end equal
        if self.level > 0 and fair > -1:
            # A prior of one difference of variance 1/4 keeps the first stakes small.
            mean = self.behind / (self.seen + 1) - fair
            spread = (self._spread + 0.25) / (self.seen + 1)
            stake = min(max(mean / (spread + mean * mean), 0.0), 0.75 / (1 + fair))
            self._log_wealth += math.log1p(stake * (difference - fair))
        self.behind += difference
        self._spread += difference * difference
        return self.level > 0 and self._log_wealth >= -math.log(self.level)

    def _certain(self) -> bool:
        left = self.total - self.seen
        if self.rival.correct is None:
            return self.nats > self.rival.loss * self.total * (1 + 1e-9)
        return self.right + left < sum(self.rival.correct) - self.rival.spare - ROUNDING
