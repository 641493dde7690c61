"""One thread for work that is too small to share."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch operations of the calling thread in that thread alone, within the block.

    Afterwards, also after an exception, the number of threads is restored; contexts may be nested.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
