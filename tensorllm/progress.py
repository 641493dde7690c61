"""How work that takes long says how far it is."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int, str], None]  # parts done, parts in all, what is being done


def quiet(done: int, total: int, what: str) -> None:
    """The default: says nothing."""


@contextmanager
def silenced(library: str) -> Iterator[None]:
    """No warnings of a library's logger meanwhile; errors stay."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
