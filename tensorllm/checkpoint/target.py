"""The output folder: whether it may be made, and by one run at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tensorllm.errors import UserError


def check_target(target: Path, *, overwrite: bool, source: Path | None = None) -> None:
    """Refuse an output folder that exists, is a file, is the input, or cannot be written."""
    if source is not None and target.resolve() == source.resolve():
        raise UserError(f"the output folder {target} is the input folder; give another --out")
    inside = [p for p in (Path.cwd(), source) if p and p.resolve().is_relative_to(target.resolve())]
    if inside:
        raise UserError(f"the output folder {target} holds {inside[0]}; give another --out")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(f"the output {target} exists and is not a folder")
    if target.exists() and not overwrite:
        raise UserError(f"the output folder {target} exists; give --overwrite to replace it")
    parent = next(p for p in [target.absolute().parent, *target.absolute().parents] if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"cannot write to {parent}: not a writable folder")


@contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Refuse a second run that would write the same folder at the same time."""
    lock = target.parent / f".{target.name}.lock"
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process that holds it
            # Else deleted by the run that held it, after it was opened here: no longer *the* lock.
            ours = os.path.samestat(os.fstat(file.fileno()), lock.stat())
        except (BlockingIOError, FileNotFoundError):
            ours = False
        if not ours:
            raise UserError(f"another run is writing {target}; give another --out")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
