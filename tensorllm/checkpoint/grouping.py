"""Things that must be handled together because they touch the same parameter."""

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def sharing(
    items: Iterable[T], names_of: Callable[[T], set[str]]
) -> list[tuple[set[str], list[T]]]:
    """Groups of items such that no name belongs to two groups, each with all its names."""
    groups: list[tuple[set[str], list[T]]] = []
    for item in items:
        names, together = names_of(item), [item]
        for group in [g for g in groups if g[0] & names]:
            groups.remove(group)
            names, together = names | group[0], group[1] + together
        groups.append((names, together))
    return groups
