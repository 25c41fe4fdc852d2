"""Shuffle by computation: a permutation that is evaluated per index and uses no memory."""

from __future__ import annotations

import hashlib

_ROUNDS = 6


def permute_index(index: int, size: int, key: str) -> int:
    """Return the image of `index` under a permutation of 0 ... size - 1 that `key` selects.

    A Feistel network over the next power of four, repeated until the result is below `size`
    (cycle walking): Black and Rogaway 2002, "Ciphers with arbitrary finite domains". The cost does
    not depend on `size`: less than four evaluations of the network on average.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    while True:
        index = _feistel(index, half_bits, key)
        if index < size:
            return index


def _feistel(index: int, half_bits: int, key: str) -> int:
    mask = (1 << half_bits) - 1
    left = index >> half_bits
    right = index & mask
    for number in range(_ROUNDS):
        digest = hashlib.blake2b(f"{key}/{number}/{right}".encode(), digest_size=8).digest()
        mixed = left ^ (int.from_bytes(digest) & mask)
        left = right
        right = mixed
    return left << half_bits | right
