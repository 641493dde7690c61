"""The reported metrics over many answers, as torchmetrics: exact over any number of devices.

Every metric keeps two float64 sums, so that batch sizes do not matter.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

TOP = (1, 5, 10)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """How a metric is shown in tables, sentences and plots.

    Attributes:
        name: of the metric.
        unit: empty for a pure number.
        digits: decimals in a table; a sentence and a plot have one less.
        upwards: whether larger is better.
    """

    name: str
    unit: str = ""
    digits: int = 2
    upwards: bool = True

    @property
    def title(self) -> str:
        """A title such as `loss, nats per token`."""
        return f"{self.name}, {self.unit}" if self.unit else self.name

    def better(self, change: float) -> bool:
        """Whether a change is not for the worse."""
        return change >= 0 if self.upwards else change <= 0

    def tone(self, change: float) -> str:
        """`good` or `bad`; empty for a change that is too small to show."""
        if not float(self.brief(change)):
            return ""
        return "good" if self.better(change) else "bad"

    def exact(self, value: float) -> str:
        """The value as in tables."""
        return f"{value:.{self.digits}f}"

    def brief(self, value: float) -> str:
        """The value as in sentences and plots."""
        return f"{value:.{self.digits - 1}f}"


SHOWN = {  # by their names in results, in the order of tables
    "accuracy": Shown(name="accuracy", unit="%"),
    "loss": Shown(name="loss", unit="nats per token", digits=4, upwards=False),
    "perplexity": Shown(name="perplexity", upwards=False),
    "top_1": Shown(name="first token in top 1", unit="%"),
    "top_5": Shown(name="first token in top 5", unit="%"),
    "top_10": Shown(name="first token in top 10", unit="%"),
    "token_f1": Shown(name="token F1", unit="%"),
}
MAIN = ("accuracy", "loss")  # the metrics with intervals and tests


class Ratio(Metric):
    """A quotient of two sums over examples, in float64; NaN terms are left out.

    torchmetrics' own MeanMetric sums in float32 once a LightningModule holds it.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in ("total", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, terms: Tensor, weights: Tensor | None = None) -> None:
        known = ~terms.isnan()
        weights = torch.ones_like(terms) if weights is None else weights
        self.total += terms[known].double().sum()
        self.count += weights[known].double().sum()

    def compute(self) -> Tensor:
        return self.total / self.count


class Percentage(Ratio):
    """The quotient, in per cent."""

    def compute(self) -> Tensor:
        return 100 * super().compute()


class Exponential(Ratio):
    """exp of the quotient."""

    def compute(self) -> Tensor:
        return super().compute().exp()


Columns = Mapping[str, Tensor]  # one value per example; NaN where there is no question


class AnswerMetric(NamedTuple):
    """A metric over many answers.

    Attributes:
        kind: how it is computed from the sums.
        terms: of the columns (`correct`, `log_probability`, `answer_tokens`, `rank` and
            `token_f1`): what is summed; and the weights whose sum divides it, by default 1 each.
    """

    kind: type[Ratio]
    terms: Callable[[Columns], tuple[Tensor, ...]]


def _within(k: int) -> AnswerMetric:
    def terms(c: Columns) -> tuple[Tensor, ...]:
        return ((c["rank"] <= k).double().masked_fill(c["rank"].isnan(), torch.nan),)

    return AnswerMetric(Percentage, terms)


METRICS = {  # by their names in results
    "accuracy": AnswerMetric(Percentage, lambda c: (c["correct"],)),
    # mean over examples, in nats per token
    "loss": AnswerMetric(Ratio, lambda c: (-c["log_probability"] / c["answer_tokens"],)),
    # over tokens
    "perplexity": AnswerMetric(Exponential, lambda c: (-c["log_probability"], c["answer_tokens"])),
    **{f"top_{k}": _within(k) for k in TOP},
    "token_f1": AnswerMetric(Percentage, lambda c: (c["token_f1"],)),
}


def answer_metrics(**options: Any) -> MetricCollection:
    """All metrics by their names in results; `options` are torchmetrics' own."""
    made: dict[str, Any] = {name: metric.kind(**options) for name, metric in METRICS.items()}
    return MetricCollection(made, compute_groups=False)


def add_answers(metrics: MetricCollection, columns: Columns) -> None:
    """Add these examples to the metrics."""
    for name, metric in metrics.items():
        metric.update(*METRICS[name].terms(columns))
