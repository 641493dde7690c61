"""How work that takes long says how far it is."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int, str], None]  # parts done, parts in all, what is being done


def quiet(done: int, total: int, what: str) -> None:
    """The default: says nothing."""


@contextmanager
def silenced(*libraries: str) -> Iterator[None]:
    """No warnings of libraries' loggers meanwhile; errors stay."""
    loggers = [logging.getLogger(name) for name in libraries]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
