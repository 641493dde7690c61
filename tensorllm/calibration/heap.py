"""Memory that was freed, given back to the system.

glibc returns freed memory only from the end of its heap. A fit leaves small tensors of each layer
(factors, covariances) between large ones that come and go, so that what lies below them stays with
the process: about a third of a whole model's peak, before it was given back layer by layer.
"""

import ctypes
from collections.abc import Callable
from functools import cache


def trim_heap() -> None:
    """Return the free pages of the heap to the system; nothing where the C library cannot."""
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
