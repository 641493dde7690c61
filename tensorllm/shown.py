"""How metrics are shown to people; without torchmetrics, which takes seconds to import."""

from dataclasses import dataclass


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
MAIN = ("accuracy", "loss")  # those that have intervals and tests
