"""Where trials are stored: one file that survives kills, or any database SQLAlchemy supports."""

import fcntl
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock  # the type of `lock_obj`
from sqlalchemy import create_engine, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from tensorllm.errors import Incomplete, UserError, first_line

JOURNAL = "trials.journal"
HEARTBEAT = 10  # seconds; a trial without a heartbeat for three of these is taken over


class FileLock(BaseJournalFileLock):
    """An advisory file lock that the system releases when its holder dies.

    Optuna's own locks are files or links that a killed process leaves behind for 30 s. Taking the
    lock also cuts off a half-written last line: its writer was killed, or the disk was full.
    """

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        self._descriptor = _descriptor(self.journal.with_suffix(".lock"))
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        self._cut_torn_line()
        return True

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _cut_torn_line(self) -> None:
        with self.journal.open("r+b") as journal:
            size = end = journal.seek(0, os.SEEK_END)
            while end:
                step = min(end, 4096)
                journal.seek(end - step)
                newline = journal.read(step).rfind(b"\n")
                if newline >= 0:
                    end += newline + 1 - step
                    break
                end -= step
            if end < size:
                journal.truncate(end)


class Claims:
    """The trials that live processes of this machine are examining: one locked byte for each.

    A record lock ends with its process, however that ends. It only excludes other processes, so
    this process's own claims are remembered as well.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = _descriptor(path)
        self._own: set[int] = set()

    def __del__(self) -> None:
        os.close(self._descriptor)

    def take(self, number: int) -> bool:
        """Claim a trial; False if another process, or this one already, has it."""
        if number in self._own:
            return False
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except BlockingIOError:
            return False
        self._own.add(number)
        return True

    def free(self, number: int) -> None:
        self._own.discard(number)
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, number)


def _descriptor(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)


@contextmanager
def stable() -> Iterator[None]:
    """Silence Optuna's warnings about experimental features such as heartbeats."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def open_storage(folder: Path, url: str | None) -> BaseStorage:
    """Open the journal in `folder`, or the database at `url`.

    Raises:
        UserError: the journal is damaged (it is renamed, not deleted), or the URL is wrong.
        Incomplete: the database cannot be reached.
    """
    if url is not None:
        return _database(url)
    journal = folder / JOURNAL
    journal.touch()
    check_journal(journal)
    return JournalStorage(JournalFileBackend(str(journal), lock_obj=FileLock(journal)))


def check_journal(journal: Path) -> None:
    """Rename a journal with a damaged line, other than the last, and raise UserError."""
    lines = journal.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            json.loads(line)
        except ValueError:
            aside = journal.with_name(f"{journal.name}.damaged")
            count = 1
            while aside.exists():
                count += 1
                aside = journal.with_name(f"{journal.name}.damaged-{count}")
            journal.rename(aside)
            raise UserError(
                f"the study file {journal} is damaged at line {number}; it is kept as "
                f"{aside.name}. The same command begins the study anew; to save the trials "
                f"before line {number}, copy these lines back to {journal.name}"
            ) from None


def check_storage(url: str) -> None:
    """Refuse a database that cannot be opened, before anything slow is done for it.

    Raises:
        UserError: the URL is wrong.
        Incomplete: the database cannot be reached.
    """
    with _reached(url):
        create_engine(url).connect().close()


def _database(url: str) -> BaseStorage:
    with _reached(url), stable():
        return RDBStorage(
            url,
            heartbeat_interval=HEARTBEAT,
            grace_period=3 * HEARTBEAT,
            heartbeat_stale_trial_callback=queue_again,
        )


@contextmanager
def _reached(url: str) -> Iterator[None]:
    """Report a database that cannot be opened in one line."""
    try:
        shown = str(make_url(url))  # without its password
    except ArgumentError:
        raise UserError("--storage must be a URL such as postgresql://user@host/name") from None
    try:
        yield
    except (NoSuchModuleError, ImportError) as error:
        raise UserError(f"--storage {shown} is not usable: {first_line(error)}") from None
    except SQLAlchemyError as error:
        raise Incomplete(f"cannot reach the storage {shown}: {first_line(error)}") from None


def queue_again(study: optuna.Study, lost: optuna.trial.FrozenTrial) -> None:
    """Put a lost worker's trial back into the queue."""
    study.add_trial(
        optuna.create_trial(
            state=optuna.trial.TrialState.WAITING,
            params=lost.params,
            distributions=lost.distributions,
            system_attrs={k: v for k, v in lost.system_attrs.items() if k == "fixed_params"},
        )
    )


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Report failures of disk and database in one line that says how to go on."""
    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError, OSError) as error:
        raise Incomplete(
            f"{what}: the study cannot be written: {first_line(error)}. With --study or --storage "
            "finished trials are safe: run the same command again to go on"
        ) from error
