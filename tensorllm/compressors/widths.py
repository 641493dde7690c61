"""FFN widths that other tools run well."""

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
