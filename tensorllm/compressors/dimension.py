"""A dimension of a strategy's search space."""

from dataclasses import dataclass

from tensorllm.options import Value


@dataclass(frozen=True, slots=True)
class Dimension:
    """A setting that `search-ranks` may vary.

    Attributes:
        values: those tried if the user gives none, ascending: all whole numbers, all floats, or all
            names.
        allowed: smallest and largest number that a user may give (0 itself is excluded on a
            logarithmic scale); None: only those of `values`.
        names: allowed members of a user's sets of names, which are joined by `+`; empty: only
            `values`.
        log: whether a sampler draws numbers between the bounds on a logarithmic scale.
        optional: whether it is varied only if the user gives values.
    """

    values: tuple[Value, ...]
    allowed: tuple[float, float] | None = None
    names: tuple[str, ...] = ()
    log: bool = True
    optional: bool = False
