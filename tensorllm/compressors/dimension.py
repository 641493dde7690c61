"""What a search may vary of a strategy."""

from dataclasses import dataclass

from tensorllm.options import Value


@dataclass(frozen=True, slots=True)
class Dimension:
    """One thing that `search-ranks` may vary.

    Attributes:
        values: what is tried where the user names no values, ascending: all whole numbers, all
            floats, or all names.
        allowed: smallest and largest number that a user may name (on a logarithmic scale 0 itself
            is not one); None: only those of `values`.
        names: what a user's sets of names, joined by `+`, may hold; empty: only `values`.
        log: whether a sampler draws numbers between the bounds on a logarithmic scale.
        optional: it is varied only where the user names values.
    """

    values: tuple[Value, ...]
    allowed: tuple[float, float] | None = None
    names: tuple[str, ...] = ()
    log: bool = True
    optional: bool = False
