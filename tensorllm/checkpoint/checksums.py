"""SHA-256 of files, in threads: hashing and reading leave the interpreter to others."""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tensorllm.environment import cores


def sha256(path: Path) -> str:
    """Checksum of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256s(paths: Iterable[Path]) -> Iterator[str]:
    """Checksums of several files in their order, as many at a time as there are processors."""
    with ThreadPoolExecutor(cores()) as pool:
        yield from pool.map(sha256, paths)
