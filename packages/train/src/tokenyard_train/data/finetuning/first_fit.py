"""Pack items into rows by first fit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def first_fit(sizes: Sequence[int], capacity: int) -> NDArray[np.int64]:
    """Return the row of each item, in order: the first row that has room for it, else a new one.

    Sizes are at most `capacity`. It takes O(N log N) for N items: a tree over the rows holds the
    most room of any row below a node (Johnson 1973, "Near-optimal bin packing algorithms").
    """
    leaves = 1 << max(0, (len(sizes) - 1).bit_length())
    room = [capacity] * (2 * leaves)  # node n has the children 2n and 2n + 1; leaves are rows
    rows = np.empty(len(sizes), dtype=np.int64)
    for item, size in enumerate(sizes):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < size:
                node += 1
        rows[item] = node - leaves
        room[node] -= size
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows
