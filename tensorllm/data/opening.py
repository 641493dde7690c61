"""Read text files with or without a byte order mark or compression."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import IO, Any

from tensorllm.errors import UserError

PACKED: dict[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def ending(path: Path) -> str:
    """The file's suffix, such as `.jsonl`, without that of a compression."""
    inner = Path(path.stem) if path.suffix.lower() in PACKED else path
    return inner.suffix.lower()


def lines_of(path: Path) -> Generator[str, None, None]:
    """The lines of a text file.

    Raises:
        UserError: it is not UTF-8, cannot be read, or its compression is damaged.
    """
    opened: Callable[..., IO[Any]] = PACKED.get(path.suffix.lower(), open)
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} must be UTF-8 text: {error.reason} at byte {error.start}"
        ) from None
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{path} is not a whole {path.suffix} file: {error}") from None
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"cannot read the text {str(path)!r}: {why}") from None
