"""How long-running work reports its progress."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int, str], None]  # parts done, parts in all, what is being done


def quiet(done: int, total: int, what: str) -> None:
    """The default: reports nothing."""


@contextmanager
def silenced(*libraries: str) -> Iterator[None]:
    """Hide warnings of these libraries' loggers within the block; errors are still shown."""
    loggers = [logging.getLogger(name) for name in libraries]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
