"""Results on disk: folders that are complete or do not exist, and functions that read them.

A run keeps its predictions, batch by batch, in `.NAME.partial/` beside the folder it will become;
the folder appears by one rename, when it is complete. A run with another fingerprint starts over.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorllm.environment import printable
from tensorllm.errors import Incomplete, UserError, first_line
from tensorllm.evaluation.predictions import Prediction, read_predictions, write_predictions
from tensorllm.evaluation.protocol import Protocol
from tensorllm.evaluation.statistics import compared, intervals
from tensorllm.io import from_json, locked, no_space, replace_folder, sync, write_json, write_text
from tensorllm.shown import SHOWN

if TYPE_CHECKING:  # it imports Lightning, which takes seconds
    from tensorllm.data.base import ReasoningDataModule

RESULTS = "results.json"
PREDICTIONS = "predictions.parquet"
BEFORE = "predictions-before.parquet"
SCHEMA = 1


class ResultsFolder:
    """The folder of one run, from its journals to the final rename.

    Args:
        target: the folder that will hold the results.
        fingerprint: identifies the run; journals of any other run are deleted.
        overwrite: replace an existing folder.

    Raises:
        UserError: the target may not be written or replaced.
    """

    def __init__(self, target: Path, fingerprint: str, *, overwrite: bool = False) -> None:
        self.target = Path(target)
        self.overwrite = overwrite
        self.partial = self.target.absolute().parent / f".{self.target.name}.partial"
        self.lock = self.partial.with_suffix(".lock")
        check_free(self.target, overwrite)
        try:
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            with locked(self.lock):  # several processes begin together
                self._begin(fingerprint)
        except OSError as error:
            raise UserError(f"cannot write to {self.partial.parent}: {error.strerror}") from None

    def _begin(self, fingerprint: str) -> None:
        """Remove the files of any other run."""
        note = self.partial / "fingerprint"
        if note.is_file() and note.read_text(encoding="utf-8") == fingerprint:
            return
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self.partial.mkdir()
        write_text(note, fingerprint)

    def journal(self, name: str) -> Path:
        """The folder for the journal of one of the run's models."""
        return self.partial / f"journal-{name}"

    def finish(
        self, results: dict[str, Any], predictions: Mapping[str, Sequence[Prediction]]
    ) -> None:
        """Write everything, then let the folder appear.

        Args:
            results: the content of results.json.
            predictions: by the name of their file.

        Raises:
            UserError: the target exists by now; the journals are kept, and --overwrite goes on.
            Incomplete: the disk is full.
        """
        done = self.partial / "done"
        try:
            shutil.rmtree(done, ignore_errors=True)
            done.mkdir()
            for name, of_model in predictions.items():
                write_predictions(done / name, of_model)
            write_json(done / RESULTS, results)
            for path in done.iterdir():
                sync(path)
            check_free(self.target, self.overwrite)  # another run may have been faster
            replace_folder(done, self.target)
        except OSError as error:
            raise disk_full(self.target, error) from None
        shutil.rmtree(self.partial, ignore_errors=True)
        self.lock.unlink(missing_ok=True)


def disk_full(folder: Path, error: OSError) -> Incomplete:
    """The error of a run that cannot go on but whose finished batches are kept."""
    return no_space(folder, error, "batch")


def check_free(target: Path, overwrite: bool) -> None:
    """Refuse a target that holds anything but results to be replaced."""
    if target.exists() and not target.is_dir():
        raise UserError(f"--out must be a folder, {target} is a file")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise UserError(f"the output folder {target} exists; give --overwrite to replace it")
        if not (target / RESULTS).is_file():
            raise UserError(f"--overwrite replaces results only, and {target} has no {RESULTS}")


def read_results(folder: Path) -> tuple[dict[str, Any], list[Prediction]]:
    """The results and predictions in a results folder.

    Raises:
        UserError: it is not one, or is damaged.
    """
    try:
        results = from_json((folder / RESULTS).read_text(encoding="utf-8"))
        return results, read_predictions(folder / PREDICTIONS)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)[:120]
        raise UserError(f"{folder} is not a folder of results: {reason}") from None


def compare(before: Path, after: Path, seed: int = 0) -> dict[str, Any]:
    """Compare two results folders, over the examples that both contain.

    Returns:
        The two results, their `metrics` over the common examples, the statistics of `compared`
        over these, and the predictions that went `wrong_to_right` and `right_to_wrong`.

    Raises:
        UserError: the datasets or protocols differ, or no example is in both.
    """
    from tensorllm.evaluation.totals import metrics_of

    (first, old), (second, new) = read_results(before), read_results(after)
    if first["dataset"] != second["dataset"] or first["protocol"] != second["protocol"]:
        raise UserError(
            f"only results of one dataset and protocol compare, got {first['dataset']} "
            f"({first['protocol']}) and {second['dataset']} ({second['protocol']})"
        )
    found = {(p.index, p.prompt, p.answer): p for p in new}
    pairs = [(p, found[k]) for p in old if (k := (p.index, p.prompt, p.answer)) in found]
    if not pairs:
        raise UserError(f"{before} and {after} have no example in common")
    changed = [(was, now) for was, now in pairs if was.correct != now.correct]
    common = {"before": [was for was, _ in pairs], "after": [now for _, now in pairs]}
    return {
        "before": first,
        "after": second,
        "metrics": {when: metrics_of(of_run) for when, of_run in common.items()},
        "comparison": compared(common["before"], common["after"], seed),
        "wrong_to_right": [asdict(now) for _, now in changed if now.correct],
        "right_to_wrong": [asdict(now) for _, now in changed if not now.correct],
    }


@dataclass(frozen=True, slots=True)
class Scored:
    """A model's predictions in the order of the examples, and its metrics by name."""

    predictions: list[Prediction]
    metrics: Mapping[str, float]


def results_of(
    data: "ReasoningDataModule",
    protocol: Protocol,
    model: Scored,
    before: Scored | None,
    *,
    seed: int,
) -> dict[str, Any]:
    """The figures of results.json: metrics, 95 % intervals, and paired tests against the original.

    The tests are left out where there is no original.
    """

    def figures(scored: Scored) -> dict[str, Any]:
        return {
            "metrics": {n: scored.metrics[n] for n in SHOWN if n in scored.metrics},
            "intervals": intervals(scored.predictions, seed),
        }

    results = {
        "schema": SCHEMA,
        **figures(model),
        "examples": len(model.predictions),
        "dataset": data.name,
        "data_file": None if data.data_file is None else printable(str(data.data_file)),
        "notes": data.notes,
        "protocol": protocol.name,
        "quirks": protocol.quirks(),
        "split": data.split,
        "limit": data.limit,
        "truncated_prompts": sum(p.truncated > 0 for p in model.predictions),
        "seed": seed,
    }
    if before is not None:
        results["before"] = figures(before)
        results["comparison"] = compared(before.predictions, model.predictions, seed)
    return results
