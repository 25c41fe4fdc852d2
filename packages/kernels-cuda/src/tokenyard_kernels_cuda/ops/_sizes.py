"""Launch sizes: rounding, and how many warps fit into a block."""

from __future__ import annotations

WARP = 32
"""Threads in a warp."""

SHARED = 48 << 10
"""Bytes of shared memory that a block can use on every GPU without opting in to more."""


def ceil_div(number: int, by: int) -> int:
    """Divide, rounding up."""
    return -(-number // by)


def round_up(number: int, to: int) -> int:
    """Round up to a multiple of `to`."""
    return ceil_div(number, to) * to


def fitting_warps(limit: int, words_per_warp: int, words_per_block: int = 0) -> int:
    """Return how many warps a block can have within its shared memory, in words of 4 bytes.

    The result is `limit`, a power of two, halved until the block fits; at least 1.
    """
    warps = limit
    while warps > 1 and 4 * (words_per_block + warps * words_per_warp) > SHARED:
        warps //= 2
    return warps
