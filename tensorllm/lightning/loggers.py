"""Any of Lightning's loggers by name, and the metrics that compress and search log.

An evaluation has a Trainer, which logs what the module logs.
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorllm.errors import UserError, first_line
from tensorllm.io import check_writable
from tensorllm.registry import one_of

if TYPE_CHECKING:  # Optuna is an extra
    from optuna.trial import FrozenTrial

FOLDER = Path("logs")


class MetricLog:
    """Logs numbers by name and step, to one of Lightning's loggers or to none."""

    def __init__(self, logger: Any = None) -> None:
        self.logger = logger
        self._trials: set[int] = set()
        self._best: float | None = None

    @property
    def folder(self) -> Path | None:
        """The folder with what was logged, as of `folder_of`."""
        return folder_of(self.logger)

    def metrics(self, prefix: str, values: Mapping[str, Any], step: int = 0) -> None:
        """Log the finite numbers among the values, as `prefix/name`."""
        numbers = {
            f"{prefix}/{name}": float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        if self.logger is not None and numbers:
            self.logger.log_metrics(numbers, step)

    def compression(self, report: Mapping[str, Any]) -> None:
        """Log all ratios, each site's error with its number as the step, and scores."""
        self.metrics("compress/ratio", report["ratios"])
        for step, site in enumerate(report["sites"]):
            self.metrics("compress/site", site, step)
        self.metrics("compress", report)
        for when, scores in (report["evaluation"] or {}).items():
            self.metrics(f"compress/{when}", scores)

    def trials(self, trials: "Sequence[FrozenTrial]") -> None:
        """Log the result of each trial that ended since the last call, its number as the step."""
        if self.logger is None:
            return
        from tensorllm.search.queue import RESULT

        for trial in trials:
            found = trial.user_attrs.get(RESULT)
            if trial.number in self._trials or found is None or not trial.state.is_finished():
                continue
            self._trials.add(trial.number)
            self.metrics("search", found, trial.number)
            accuracy = found["accuracy"]
            if accuracy is not None and not found["stopped"]:
                self._best = accuracy if self._best is None else max(self._best, accuracy)
            if self._best is not None:
                self.metrics("search", {"best_accuracy": self._best}, trial.number)

    def search(self, results: Mapping[str, Any]) -> None:
        """Log the test scores of the original and the winner."""
        for who in ("original", "winner"):
            self.metrics(f"search/{who}", results[who]["test"])


NOWHERE = MetricLog()


@contextmanager
def metric_log(name: str | None, folder: Path | None, command: str) -> Iterator[MetricLog]:
    """A log for a command without a Trainer; it is finalised at the end in any case.

    Its arguments are those of `make_logger`.
    """
    logger = make_logger(name, folder, command)
    if logger is None:
        yield NOWHERE
        return
    try:
        yield MetricLog(logger)
    except BaseException:
        logger.finalize("failed")
        raise
    logger.finalize("success")


def folder_of(logger: Any) -> Path | None:
    """Where a logger has written files; None where it sends what it gets elsewhere, or is none."""
    named = getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None)
    return Path(named) if named is not None and Path(named).is_dir() else None


def make_logger(name: str | None, folder: Path | None, command: str) -> Any:
    """One of Lightning's loggers; None if none is requested.

    Args:
        name: tensorboard, csv, wandb, ...
        folder: where loggers that write files put them; `logs` by default.
        command: the name of the run there.

    Raises:
        UserError: no such logger, or its package is not installed.
    """
    if name is None:
        if folder is not None:
            raise UserError("--log-dir goes with --logger: tensorboard, csv, ...")
        return None
    from lightning.pytorch import loggers

    named = [kind for kind in loggers.__all__ if kind != "Logger"]  # the base class
    kinds = {kind.removesuffix("Logger").lower(): kind for kind in named}
    kind = getattr(loggers, kinds[one_of("--logger", name, sorted(kinds))])
    given = {"save_dir": str(folder or FOLDER), "name": command}
    known = inspect.signature(kind).parameters
    if "save_dir" in known:
        check_writable(Path(given["save_dir"]))
    try:
        return kind(**{key: value for key, value in given.items() if key in known})
    except ModuleNotFoundError as error:
        needs = first_line(error)
        if name == "tensorboard":
            needs = "pip install 'tensorllm[tensorboard]'"
        raise UserError(f"--logger {name} needs a package that is not here: {needs}") from None
