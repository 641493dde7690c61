"""What is reported of many answers, as torchmetrics: exact over any number of devices.

Every metric keeps two float64 sums, so that neither the order of batches nor their sizes matter.
Each takes what it needs of the columns `correct`, `log_probability`, `answer_tokens`, `rank` and
`token_f1`, all of shape (examples,).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

TOP = (1, 5, 10)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """How people are told of a metric, in a table, a sentence or a plot.

    Attributes:
        name: what it is.
        unit: what it is counted in; empty where it is a pure number.
        digits: decimals in a table; a sentence and a plot have one less.
        upwards: whether more is better.
    """

    name: str
    unit: str = ""
    digits: int = 2
    upwards: bool = True

    @property
    def title(self) -> str:
        """Such as `loss, nats per token`."""
        return f"{self.name}, {self.unit}" if self.unit else self.name

    def better(self, change: float) -> bool:
        """Whether a change is none for the worse."""
        return change >= 0 if self.upwards else change <= 0

    def tone(self, change: float) -> str:
        """`good` or `bad`; empty for a change that is too small to be shown."""
        if not float(self.brief(change)):
            return ""
        return "good" if self.better(change) else "bad"

    def exact(self, value: float) -> str:
        """The value as tables have it."""
        return f"{value:.{self.digits}f}"

    def brief(self, value: float) -> str:
        """The value as sentences and plots have it."""
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
MAIN = ("accuracy", "loss")  # those that have intervals and tests


class Ratio(Metric, ABC):
    """A quotient of two sums over examples."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in ("total", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def add(self, values: Tensor, weights: Tensor) -> None:
        """Add examples; NaN values do not count."""
        known = ~values.isnan()
        self.total += values[known].double().sum()
        self.count += weights[known].double().sum()

    def ratio(self) -> Tensor:
        """Total over count; NaN where nothing was counted."""
        return self.total / self.count

    @abstractmethod
    def compute(self) -> Tensor: ...


class Accuracy(Ratio):
    """Right answers, in per cent; running text (NaN) has none."""

    def update(self, correct: Tensor) -> None:
        self.add(correct, torch.ones_like(correct))

    def compute(self) -> Tensor:
        return 100 * self.ratio()


class AnswerLoss(Ratio):
    """Mean over examples of -(log-probability of the answer) / (its tokens), in nats per token."""

    def update(self, log_probability: Tensor, answer_tokens: Tensor) -> None:
        self.add(-log_probability / answer_tokens, torch.ones_like(log_probability))

    def compute(self) -> Tensor:
        return self.ratio()


class Perplexity(Ratio):
    """exp of the mean over tokens, not over examples."""

    def update(self, log_probability: Tensor, answer_tokens: Tensor) -> None:
        self.add(-log_probability, answer_tokens)

    def compute(self) -> Tensor:
        return self.ratio().exp()


class TopK(Ratio):
    """How often the answer's first token is among the k most probable, in per cent."""

    def __init__(self, k: int, **options: Any) -> None:
        super().__init__(**options)
        self.k = k

    def update(self, rank: Tensor) -> None:
        within = (rank <= self.k).double().masked_fill(rank.isnan(), torch.nan)
        self.add(within, torch.ones_like(within))

    def compute(self) -> Tensor:
        return 100 * self.ratio()


class TokenF1(Ratio):
    """Mean token F1, in per cent; running text (NaN) has none."""

    def update(self, token_f1: Tensor) -> None:
        self.add(token_f1, torch.ones_like(token_f1))

    def compute(self) -> Tensor:
        return 100 * self.ratio()


def answer_metrics(**options: Any) -> MetricCollection:
    """All of them by the names they have in results; `options` are torchmetrics' own."""
    return MetricCollection(
        {
            "accuracy": Accuracy(**options),
            "loss": AnswerLoss(**options),
            "perplexity": Perplexity(**options),
            **{f"top_{k}": TopK(k, **options) for k in TOP},
            "token_f1": TokenF1(**options),
        },
        compute_groups=False,
    )
