"""One thread for work whose parts are too small to share."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it torch's operations of the calling thread run in that thread alone.

    Afterwards, and after an exception, they have as many threads as before; contexts may be nested.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
