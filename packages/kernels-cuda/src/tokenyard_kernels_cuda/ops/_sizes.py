"""Counting blocks."""

from __future__ import annotations

WARP = 32
"""Threads of a warp."""

SHARED = 48 << 10
"""Bytes of shared memory that a block has on every GPU."""


def ceil_div(number: int, by: int) -> int:
    """Return number / by, rounded up."""
    return -(-number // by)


def round_up(number: int, to: int) -> int:
    """Return the least multiple of `to` that is not below a number."""
    return ceil_div(number, to) * to


def fitting_warps(most: int, words_each: int, words_of_block: int = 0) -> int:
    """Return how many warps, a power of two up to `most`, have room in shared memory for so many words of 4 bytes."""
    while most > 1 and 4 * (words_of_block + most * words_each) > SHARED:
        most //= 2
    return most
