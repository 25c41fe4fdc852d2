"""Orders that need no memory: the place of any sample in a shuffled epoch, by computation."""

from __future__ import annotations

import hashlib

_ROUNDS = 6


def shuffled(place: int, size: int, key: str) -> int:
    """Return where a permutation of 0 ... size - 1, drawn by a key, puts `place`.

    A Feistel network over the next power of four, walked until it falls into the range again: Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains". Each lookup costs the same for any size; less than four walks on average.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    while True:
        place = _feistel(place, half, key)
        if place < size:
            return place


def _feistel(place: int, half: int, key: str) -> int:
    mask = (1 << half) - 1
    left, right = place >> half, place & mask
    for number in range(_ROUNDS):
        digest = hashlib.blake2b(f"{key}/{number}/{right}".encode(), digest_size=8).digest()
        left, right = right, left ^ (int.from_bytes(digest) & mask)
    return left << half | right
