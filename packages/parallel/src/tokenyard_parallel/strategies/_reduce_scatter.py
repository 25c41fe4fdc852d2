"""Reduce-scatter of 16-bit gradients with a float32 sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class WideReduceScatter:
    """A reduce-scatter of 16-bit gradients for FSDP: an all-to-all, then a float32 sum.

    The result equals a sum of gradients that were widened first, since widening is exact, and half
    as many bytes travel. A 16-bit reduce-scatter would round after every addition. Ranks are summed
    in order.
    """

    def __init__(self, ranks: int, sum_dtype: torch.dtype = torch.float32):
        self.ranks = ranks
        self.sum_dtype = sum_dtype
        # numel of the gradient buffer whose output buffer FSDP has not requested yet
        self._gradient_numel: int | None = None

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a buffer for a unit's gradients [ranks * n], then one for this rank's sum [n].

        FSDP requests both with the dtype of the gradients, one after the other.
        The first buffer has that dtype, and the second has `sum_dtype`.
        """
        (numel,) = size
        is_output = self._gradient_numel == numel * self.ranks
        self._gradient_numel = None if is_output else numel
        return torch.empty(size, dtype=self.sum_dtype if is_output else dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, **_: Any
    ) -> None:
        """Write this rank's shard [n] of the sum over ranks of gradients [ranks * n]."""
        shards = torch.empty_like(input_tensor)
        dist.all_to_all_single(shards, input_tensor, group=group)
        torch.sum(shards.view(self.ranks, -1), 0, dtype=output_tensor.dtype, out=output_tensor)
