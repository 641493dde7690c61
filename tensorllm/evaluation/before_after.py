"""One measurement of a model, with the original's beside it, as files hold it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def count_of_examples(number: int) -> str:
    """`1 example`, `2,000 examples`."""
    return f"{number:,} example{'' if number == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class BeforeAfter:
    """One measurement, and the same of the original if there is one.

    `evaluate` writes it as results.json, `compress --evaluate` into report.json.

    Attributes:
        before, after: metrics by name (`evaluation.totals.metrics_of`); `before` may be None.
        intervals_before, intervals_after: 95 % intervals by the metric's name, where known.
        comparison: what `evaluation.statistics.compared` found, where known.
    """

    dataset: str
    split: str
    protocol: str
    examples: int
    seed: int | None
    before: Mapping[str, float] | None
    after: Mapping[str, float]
    intervals_before: Mapping[str, list[float]]
    intervals_after: Mapping[str, list[float]]
    comparison: Mapping[str, Any] | None

    @property
    def where(self) -> str:
        """A description such as `fever, test part, protocol strict, 2,000 examples`."""
        return (
            f"{self.dataset}, {self.split} part, protocol {self.protocol}, "
            f"{count_of_examples(self.examples)}"
        )


def of_results(results: Mapping[str, Any]) -> BeforeAfter:
    """Read the content of results.json."""
    before = results.get("before") or {}
    return BeforeAfter(
        dataset=results["dataset"],
        split=results["split"],
        protocol=results["protocol"],
        examples=results["examples"],
        seed=results.get("seed"),
        before=before.get("metrics"),
        after=results["metrics"],
        intervals_before=before.get("intervals", {}),
        intervals_after=results.get("intervals", {}),
        comparison=results.get("comparison"),
    )


def of_scores(evaluation: Mapping[str, Any]) -> BeforeAfter:
    """Read `evaluation` of report.json, which has scores without intervals."""
    before, after = evaluation["before"], evaluation["after"]
    return BeforeAfter(
        dataset=after["dataset"],
        split=after["split"],
        protocol=after["protocol"],
        examples=after["examples"],
        seed=None,
        before=before,
        after=after,
        intervals_before={},
        intervals_after={},
        comparison=None,
    )
