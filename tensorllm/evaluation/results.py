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


def row_of(values: dict[str, Any]) -> Row:
    """A row from its JSON or parquet form."""
    known = {field.name for field in fields(Row)}
    kept = {name: value for name, value in values.items() if name in known}
    return Row(**{**kept, "choice_log_probabilities": tuple(kept["choice_log_probabilities"])})


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


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Rows as a parquet table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("index", pa.int64()),
            ("prompt", pa.string()),
            ("answer", pa.string()),
            ("generation", pa.string()),
            ("correct", pa.bool_()),
            ("log_probability", pa.float64()),
            ("answer_tokens", pa.int64()),
            ("rank", pa.int64()),
            ("token_f1", pa.float64()),
            ("choice_log_probabilities", pa.list_(pa.float64())),
            ("truncated", pa.int64()),
        ]
    )
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema), path)


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


def read_rows(path: Path) -> list[Row]:
    """The rows of a table that `write_rows` wrote.

    Raises:
        UserError: it is damaged or not there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return [row_of(values) for values in pq.read_table(path).to_pylist()]
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
        raise _no_results(path.parent, error) from None


def _no_results(folder: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0][:120]
    return UserError(f"{folder} is not a folder of results: {reason}")
