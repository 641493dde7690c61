"""How work that takes long says how far it is."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]  # parts done, parts in all, what is being done


def quiet(done: int, total: int, what: str) -> None:
    """The default: says nothing."""
