"""Results on disk: a folder that is there in full or not at all, and the journal of a run under
way.

A run writes its rows, batch by batch, into `.NAME.partial/` beside the folder it will become; the
folder appears by one rename, when all is in it. A run with another fingerprint begins anew.
"""

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tensorllm.errors import Incomplete, UserError
from tensorllm.evaluation.row import Row

RESULTS = "results.json"
PREDICTIONS = "predictions.parquet"
BEFORE = "predictions-before.parquet"
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Journal:
    """Rows of finished batches; every process appends to a file of its own."""

    folder: Path

    def append(self, rows: Sequence[Row]) -> None:
        """Add the rows of one batch; they survive a crash of this process."""
        name = f"rows-{socket.gethostname()}-{os.getpid()}.jsonl"
        # A line break first: what a crash cut short before must not swallow the next row.
        text = "\n" + "".join(json.dumps(asdict(row)) + "\n" for row in rows)
        try:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise no_room(self.folder, error) from None

    def rows(self) -> dict[int, Row]:
        """Row by example; a line that a crash cut short counts as not there."""
        found = {}
        for path in sorted(self.folder.glob("rows-*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = row_of(json.loads(line))
                except (ValueError, TypeError):
                    continue
                found[row.index] = row
        return found


def no_room(folder: Path, error: OSError) -> Incomplete:
    """What is said when the disk is full or gone."""
    return Incomplete(
        f"writing to {folder} failed: {error.strerror or error}. Make room and run the same "
        "command again: it goes on from the last finished batch"
    )


class ResultsFolder:
    """The folder of one run, from its journals to the final rename.

    Args:
        target: the folder that will hold the results.
        fingerprint: what names the run; a journal with another one is thrown away.
        overwrite: replace a folder that is there.
    """

    def __init__(self, target: Path, fingerprint: str, *, overwrite: bool = False) -> None:
        self.target = Path(target)
        self.overwrite = overwrite
        self.partial = self.target.absolute().parent / f".{self.target.name}.partial"
        self.lock = self.partial.with_suffix(".lock")
        check_free(self.target, overwrite)
        try:
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            with alone(self.lock):  # several processes begin together
                self._begin(fingerprint)
        except OSError as error:
            raise UserError(f"cannot write to {self.partial.parent}: {error.strerror}") from None

    def _begin(self, fingerprint: str) -> None:
        """What is there of another run goes."""
        note = self.partial / "fingerprint"
        if self.partial.exists() and (not note.is_file() or note.read_text() != fingerprint):
            shutil.rmtree(self.partial)
        self.partial.mkdir(exist_ok=True)
        note.write_text(fingerprint)

    def journal(self, name: str) -> Journal:
        """The journal of one of the run's models."""
        folder = self.partial / f"journal-{name}"
        folder.mkdir(exist_ok=True)
        return Journal(folder)

    def finish(self, results: dict[str, Any], predictions: Mapping[str, Sequence[Row]]) -> None:
        """Write everything, then let the folder appear.

        Args:
            results: the content of results.json.
            predictions: file name -> rows.

        Raises:
            UserError: the target is there by now; the rows are kept, and --overwrite goes on.
            Incomplete: the disk is full.
        """
        done = self.partial / "done"
        try:
            shutil.rmtree(done, ignore_errors=True)
            done.mkdir()
            for name, rows in predictions.items():
                write_rows(done / name, rows)
            (done / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
            for path in done.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            check_free(self.target, self.overwrite)  # another run may have come first
            if self.target.exists():
                shutil.rmtree(self.target)
            done.rename(self.target)
        except OSError as error:
            raise no_room(self.target, error) from None
        shutil.rmtree(self.partial, ignore_errors=True)
        self.lock.unlink(missing_ok=True)


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Holds a lock that the system opens when its holder dies."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def check_free(target: Path, overwrite: bool) -> None:
    """Refuse a target that holds something else than results to replace."""
    if target.exists() and not target.is_dir():
        raise UserError(f"--out must be a folder, {target} is a file")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise UserError(f"the output folder {target} exists; give --overwrite to replace it")
        if not (target / RESULTS).is_file():
            raise UserError(f"--overwrite replaces results only, and {target} has no {RESULTS}")


def read_results(folder: Path) -> tuple[dict[str, Any], list[Row]]:
    """What a results folder holds.

    Raises:
        UserError: it is not one, or is damaged.
    """
    try:
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _no_results(folder, error) from None
    return results, read_rows(folder / PREDICTIONS)


def _no_results(folder: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0][:120]
    return UserError(f"{folder} is not a folder of results: {reason}")


def compare(before: Path, after: Path, seed: int = 0) -> dict[str, Any]:
    """What changed from one folder of results to another, over the examples both have.

    Returns:
        The two results, their `metrics` over the common examples, the statistics of `compared`
        over these, and those that went from wrong to right (`mended`) and back (`broken`).
    """
    (first, old), (second, new) = read_results(before), read_results(after)
    if first["dataset"] != second["dataset"] or first["protocol"] != second["protocol"]:
        raise UserError(
            f"only results of one dataset and protocol compare, got {first['dataset']} "
            f"({first['protocol']}) and {second['dataset']} ({second['protocol']})"
        )
    found = {(row.index, row.prompt, row.answer): row for row in new}
    pairs = [(r, found[k]) for r in old if (k := (r.index, r.prompt, r.answer)) in found]
    if not pairs:
        raise UserError(f"{before} and {after} have no example in common")
    changed = [(was, now) for was, now in pairs if was.correct != now.correct]
    common = {"before": [was for was, _ in pairs], "after": [now for _, now in pairs]}
    return {
        "before": first,
        "after": second,
        "metrics": {when: metrics_of(rows) for when, rows in common.items()},
        "comparison": compared(common["before"], common["after"], seed),
        "mended": [asdict(now) for _, now in changed if now.correct],
        "broken": [asdict(now) for _, now in changed if not now.correct],
    }


@dataclass(frozen=True, slots=True)
class BeforeAfter:
    """What `evaluate` wrote as results.json, or `compress --evaluate` into report.json.

    Attributes:
        before, after: metrics by name (`evaluation.summary.metrics_of`); `before` may be None.
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
        """Such as `fever, test part, protocol strict, 2,000 examples`."""
        return (
            f"{self.dataset}, {self.split} part, protocol {self.protocol}, "
            f"{self.examples:,} examples"
        )


def of_results(results: Mapping[str, Any]) -> BeforeAfter:
    """From the content of results.json."""
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
    """From `evaluation` of report.json: scores without intervals."""
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
