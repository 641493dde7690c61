"""Atomic files, locks that end with their process, journals that survive it.

Everything the package keeps on disk goes through these functions: if a process is killed at any
moment, a name has the old file or the new one, never half of one.
"""

import errno
import hashlib
import json
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorllm.environment import cores
from tensorllm.errors import Incomplete, UserError

if TYPE_CHECKING:
    from torch import Tensor

TEMPORARY = ".tmp"
WEIGHTS = "safetensors"  # the library that opens files of weights
SHOWN = 200  # characters of a path in an error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file to write within the block; it replaces `path` if the block succeeds.

    It lies in the folder of `path`, which must exist. Each process has its own, so that several may
    write the same path: the last one wins. If the block raises, `path` is unchanged.

    Yields:
        The temporary file, empty; its name begins with a dot and ends in `.tmp`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        temporary.unlink(missing_ok=True)  # left by a killed process with the same id
        with temporary.open("xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)  # what the umask leaves of 0o666
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that only their owner can read
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Write a JSON file that ends with a line break, atomically."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def from_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        json.JSONDecodeError: it is malformed, nested too deeply, or has a number too long to read.
        UnicodeDecodeError: the bytes are no text.
    """
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except (RecursionError, ValueError) as error:
        raise json.JSONDecodeError(_unreadable(error), "", 0) from None


def from_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: it is malformed, nested too deeply, or has a number or date that is none.
    """
    import yaml

    try:
        return yaml.safe_load(text)
    except (RecursionError, ValueError) as error:
        raise yaml.YAMLError(_unreadable(error)) from None
    except (LookupError, AttributeError):  # PyYAML's own, such as for `!!bool x`
        raise yaml.YAMLError("a value is none of the type that its tag names") from None


def _unreadable(error: Exception) -> str:
    """What neither format forbids, but Python cannot hold."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error).partition(":")[0].partition(";")[0]  # without advice to programmers


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]") -> None:
    """Write a safetensors file, atomically.

    Raises:
        OSError: the disk is full or gone.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        try:
            save_file(
                {name: t.contiguous() for name, t in tensors.items()},
                temporary,
                metadata={"format": "pt"},
            )
        except SafetensorError as error:  # how it reports the system's errors
            raise OSError(str(error)) from error


def entry_bytes(name: str, shape: Iterable[int], width: int, most: int) -> int:
    """An upper bound on the bytes of a tensor's entry in a safetensors header.

    Args:
        name: of the tensor.
        shape: of the tensor.
        width: bytes per number.
        most: upper bound on the file's size in bytes.
    """
    dtype = {1: "U8", 2: "BF16"}.get(width, "F32")
    entry = {"dtype": dtype, "shape": list(shape), "data_offsets": [most, most]}
    return len(json.dumps({name: entry}, separators=(",", ":"))) - 1  # no braces, but a comma


def at_home(path: Path, *, opened_by: str | None = None) -> Path:
    """The path as a user means it: with the home folder in place of a `~`, and without `..`.

    Args:
        path: as it was given.
        opened_by: the library that opens it, if it takes names in UTF-8 only; Python takes any.

    Raises:
        UserError: no file can have this name, or none that this library opens.
    """
    with suppress(RuntimeError):  # of no user there is, `~name` is a name
        path = path.expanduser()
    shown = f"{str(path)[:SHOWN]} ..." if len(str(path)) > SHOWN else str(path)
    try:
        if ".." in path.parts:  # `new/../new` would be made in itself
            path = path.resolve()
        str(path.absolute()).encode(errors="strict" if opened_by else "surrogateescape")
        path.lstat()
    except UnicodeEncodeError:
        where = "" if path.is_absolute() else f" in the folder {Path.cwd()}"
        raise UserError(
            f"the path {shown}{where} is not text in UTF-8, as {opened_by} needs it; rename it"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: of a loop of links
        if not isinstance(error, OSError) or error.errno == errno.ENAMETOOLONG:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"the path {shown!r} cannot be that of a file: {reason}") from None
    return path


def remove_temporary(folder: Path) -> None:
    """Remove the temporary files of killed processes from a folder that nobody else writes."""
    for pattern in (f".*{TEMPORARY}", f"{TEMPORARY}*"):  # ours, and those of safetensors
        for half in folder.glob(pattern):
            half.unlink()


def sync(path: Path) -> None:
    """Return once a file, or a folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_folder(new: Path, target: Path) -> None:
    """Move a complete folder to its final name, and only then remove the one that was there.

    Args:
        new: on the same disk as `target`.
        target: an existing one is called `.NAME.old` in between.
    """
    target = target.absolute()
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.replace(old)
    new.replace(target)
    shutil.rmtree(old, ignore_errors=True)
    sync(target.parent)


def check_writable(folder: Path) -> None:
    """Refuse a folder in which no file can be created; if it does not exist, its nearest parent."""
    above = next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {above}: {error.strerror}") from None


def no_space(folder: Path, error: Exception, what: str = "file") -> Incomplete:
    """The error for a disk that is full or gone.

    Args:
        folder: where writing failed.
        error: what the system raised.
        what: the unit of work of which finished ones are kept for the next run.
    """
    free = shutil.disk_usage(folder).free / 2**20 if folder.exists() else 0
    reason = getattr(error, "strerror", None) or error
    return Incomplete(
        f"writing to {folder} failed: {reason} ({free:.0f} MiB free). Make room and run the same "
        f"command again: it goes on from the last finished {what}"
    )


@contextmanager
def locked(path: Path, *, refusal: str | None = None) -> Iterator[None]:
    """Hold the lock file `path` within the block; the system releases it if the holder dies.

    Args:
        path: created if needed; its folder must exist.
        refusal: a second process's error message, raised at once; None: it waits for its turn.

    Raises:
        UserError: another process, or other code of this one, holds it, and there is a `refusal`.
        OSError: it cannot be created there.
    """
    from filelock import FileLock, Timeout

    path.touch()  # FileLock would take a file that cannot be created for one that is held, and wait
    lock = FileLock(path, timeout=-1 if refusal is None else 0, poll_interval=0.02)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(str(refusal)) from None
    try:
        yield
    finally:
        if refusal is not None:  # nobody waits for it, so the next one creates a new file
            path.unlink(missing_ok=True)
        lock.release()


class Journal:
    """Records of finished work, a JSON line each; every process appends to its own file.

    Args:
        folder: must exist.
        stem: prefix of the journal's file names.
    """

    def __init__(self, folder: Path, stem: str = "journal") -> None:
        self.folder, self.stem = folder, stem

    def append(self, records: Iterable[Any]) -> None:
        """Add records; once this returns they survive a crash of the process.

        Raises:
            OSError: the disk is full or gone.
        """
        path = self.folder / f"{self.stem}-{socket.gethostname()}-{os.getpid()}.jsonl"
        # A line break first, so that a record cut short by a crash does not swallow the next one.
        text = "\n" + "".join(json.dumps(record) + "\n" for record in records)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)

    def records(self) -> Iterator[Any]:
        """All records, file by file; lines cut short by a crash are skipped."""
        for path in sorted(self.folder.glob(f"{self.stem}-*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError):
                    yield json.loads(line)


def sha256(path: Path) -> str:
    """Checksum of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256s(paths: Iterable[Path]) -> Iterator[str]:
    """Checksums of several files in their order, computed on all cores in parallel.

    Hashing and reading release the interpreter lock.
    """
    with ThreadPoolExecutor(cores()) as pool:
        yield from pool.map(sha256, paths)
