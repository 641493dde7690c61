"""Which widths of an FFN other tools run well."""

# Kernels like multiples of them, and llama.cpp quantises blocks of 256 or 32 numbers: rows of
# another length stay in 16 bits there.
MULTIPLES, MOST_OF_WIDTH = (256, 128, 64, 32, 16, 8), 1 / 32


def multiples(full: int) -> list[int]:
    """What a narrower width may be a multiple of, the best first: at most a 32nd of the full one,
    as up to that much is put back by rounding; 8 in any case."""
    *most, last = MULTIPLES
    return [*(each for each in most if each <= full * MOST_OF_WIDTH), last]


def rounded_up(width: int, full: int) -> int | None:
    """The width in the best multiple that is narrower than the full one; None: there is none."""
    widths = [-(-width // each) * each for each in multiples(full)]
    return next((each for each in widths if each < full), None)
