"""The transfers of an exchange in FP8: tokens, and the gradient of the output.

A token is quantized once, however many ranks it goes to. Then the permutation copies packed rows
(``tokenyard.packed_rows``). The gradient passes the rounding unchanged. Sums travel as they are:
results, and the gradient of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenyard import Permutation, Plan
from tokenyard.packed_rows import pack_rows, unpack_rows
from tokenyard_parallel.exchanges._transfer import Direction, Transfer


class Fp8Transfer(Transfer):
    """Carries rows of tokens in FP8 in one direction, and sums of rows back in the other.

    In the direction of `packs`, tokens [T, D] leave and rows [R, D] arrive. In the other one, rows
    leave, and the sums of each token's rows arrive: that is the gradient of the first.
    """

    def __init__(
        self,
        group: Any,
        sent: Sequence[int],
        received: Sequence[int],
        plan: Plan,
        permutation: Permutation,
        packs: Direction,
    ):
        super().__init__(group, sent, received)
        self.plan = plan
        self.permutation = permutation
        self.packs = packs

    def start(self, direction: Direction, rows: Tensor) -> Tensor:
        """Start to send tokens as packed rows, or rows as they are."""
        self.dtype = rows.dtype
        if direction == self.packs:
            # as float32, which autograd and permutations know
            rows = self.permutation.permute(pack_rows(rows).view(torch.float32), self.plan)
        return super().start(direction, rows)

    def finish(self, direction: Direction, arriving: Tensor) -> Tensor:
        """Return the rows that have arrived, or the sums of each token's rows."""
        rows = super().finish(direction, arriving)
        if direction == self.packs:
            return unpack_rows(rows.view(torch.uint8), self.dtype)
        return self.permutation.unpermute(rows, self.plan, None)
