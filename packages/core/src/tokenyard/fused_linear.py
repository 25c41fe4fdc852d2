"""Several linear layers of one input as one matmul, such as query, key and value projections."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


class FusedLinear(nn.Linear):
    """A linear layer whose output is that of several layers, of `sizes`, side by side."""

    def __init__(self, columns: int, sizes: Sequence[int], bias: bool = True):
        super().__init__(columns, sum(sizes), bias)
        self.fused_rows = {"weight": tuple(sizes)}
