"""Widths of a narrower FFN."""

import pytest

from tensorllm.compressors.widths import rounded_up


@pytest.mark.parametrize(
    ("width", "full", "rounded"),
    [
        (1229, 1536, 1248),  # blocks of 32
        (8806, 11008, 8960),  # blocks of 256
        (3000, 4096, 3072),
        (1520, 1536, 1520),  # a larger block would put all of them back
        (20, 56, 24),
        (1, 16, 8),
        (50, 56, None),
        (8, 8, None),
    ],
)
def test_widths_are_such_as_llama_cpp_quantises(width: int, full: int, rounded: int | None):
    """Multiples of 256, 128, ... of which one is at most a 32nd of the width; else of 8."""
    assert rounded_up(width, full) == rounded
