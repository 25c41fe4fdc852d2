"""Summing gradients that are narrower than the sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class WideSum:
    """FSDP's reduce-scatter of gradients in 16 bits, summed in float32: each rank is sent its shards, and adds them up.

    The result is that of widening first, since widening loses nothing, and half of the bytes travel. (A sum in 16 bits,
    which is what a reduce-scatter of such tensors gives, would be rounded at every step.) The order is that of ranks.
    """

    def __init__(self, ranks: int, wide: torch.dtype = torch.float32):
        self.ranks, self.wide = ranks, wide
        self._gradients: int | None = None  # numbers of the gradients whose sum has no place yet

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return room for a unit's gradients in their dtype; the next time, for this rank's share of the sum, wide.

        FSDP asks for both in the dtype of the gradients, one after the other.
        """
        (numbers,) = size
        is_sum = self._gradients == numbers * self.ranks
        self._gradients = None if is_sum else numbers
        return torch.empty(size, dtype=self.wide if is_sum else dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, **_: Any
    ) -> None:
        """Write this rank's share [n] of the sum over ranks of gradients [ranks * n]."""
        shares = torch.empty_like(input_tensor)
        dist.all_to_all_single(shares, input_tensor, group=group)
        torch.sum(shares.view(self.ranks, -1), 0, dtype=output_tensor.dtype, out=output_tensor)
