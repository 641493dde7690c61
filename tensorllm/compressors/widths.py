"""Ranks and FFN widths that kernels, and other tools, run well."""

# Kernels are fast at multiples of these, and llama.cpp quantises blocks of 256 or 32 numbers: it
# leaves rows of other lengths in 16 bits.
MULTIPLES, MOST_OF_WIDTH = (256, 128, 64, 32, 16, 8), 1 / 32


def multiples(full: int) -> list[int]:
    """Multiples for a narrower width, best first: 8, and those up to a 32nd of the full width.

    Rounding up to a multiple gives back up to that much of the width.
    """
    *most, last = MULTIPLES
    return [*(each for each in most if each <= full * MOST_OF_WIDTH), last]


def rounded_up(width: int, full: int) -> int | None:
    """The width rounded up to the best multiple that leaves it below `full`; None: none does."""
    widths = [-(-width // each) * each for each in multiples(full)]
    return next((each for each in widths if each < full), None)


def usual_multiple(full: int) -> int:
    """A power of two of which 16 to 31 make up the full rank or width; 1 for small ones.

    Kernels are fast at multiples, and sizes that many layers share need fewer of them: one made for
    the products of one shape takes most of a MiB in 16 bits.
    """
    return 2 ** max(0, full.bit_length() - 5)
