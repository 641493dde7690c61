"""Return freed memory to the operating system.

glibc returns freed memory only from the end of its heap. A fit leaves small tensors of each layer
(factors, covariances) between large temporary ones, so the memory below them would stay with the
process: about a third of the peak for a whole model, if it were not trimmed after each layer.
"""

import ctypes
from collections.abc import Callable
from functools import cache


def trim_heap() -> None:
    """Return the free pages of the heap to the system; a no-op if the C library cannot."""
    _trim()(0)


@cache
def _trim() -> Callable[[int], int]:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return lambda pad: 0
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    found: Callable[[int], int] = trim
    return found
