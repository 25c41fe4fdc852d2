"""Reduce-scatter of 16-bit gradients with a float32 sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokenyard_parallel._torch_private import reduce_scatter
from tokenyard_parallel.strategies._peers import Peers

_WIDE = 4  # bytes of a number that is added as it is


class WideReduceScatter:
    """A reduce-scatter of a unit's 16-bit gradients for FSDP: shards travel, then are summed.

    They are summed in float32, in the order of ranks, and rounded once to `sum_dtype`, by default
    that of the gradients. The result equals a sum of gradients that were widened first, since
    widening is exact, and half as many bytes travel. A 16-bit reduce-scatter would round after
    every addition. Wider gradients are summed as they are, by a collective.

    Shards travel by an all-to-all, or by copies from the memory of `peers`.
    """

    def __init__(
        self,
        ranks: int,
        peers: Peers | None,
        sum_dtype: Callable[[], torch.dtype] | None = None,
    ):
        self.ranks = ranks
        self.peers = peers
        self.sum_dtype = sum_dtype
        # the gradient buffer whose output buffer FSDP has not requested yet
        self._gradients: Tensor | None = None
        self._regions: list[Tensor] = []

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a buffer for a unit's gradients [ranks * n], then one for this rank's sum [n].

        FSDP requests both with the dtype of the gradients, one after the other. The first buffer
        has that dtype, and the second that of the sum.
        """
        (numel,) = size
        narrow = dtype.itemsize < _WIDE
        gradients = self._gradients
        self._gradients = None
        if gradients is not None and gradients.numel() == numel * self.ranks:
            wanted = self.sum_dtype() if narrow and self.sum_dtype is not None else dtype
            return torch.empty(size, dtype=wanted, device=device)
        if self.peers is None or not narrow:
            self._gradients = torch.empty(size, dtype=dtype, device=device)
        else:
            regions = self.peers.gradients.next(numel * dtype.itemsize)
            self._regions = [region.view(dtype) for region in regions]
            self._gradients = self._regions[self.peers.rank]
        return self._gradients

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, **_: Any
    ) -> None:
        """Write this rank's shard [n] of the sum over ranks of gradients [ranks * n]."""
        if input_tensor.dtype.itemsize >= _WIDE:
            reduce_scatter(output_tensor, input_tensor, group)
        elif self.peers is None:
            shards = torch.empty_like(input_tensor)
            dist.all_to_all_single(shards, input_tensor, group=group)
            _add(shards.view(self.ranks, -1).unbind(), output_tensor)
        else:
            _add(self._copy_from(self.peers), output_tensor)

    def _copy_from(self, peers: Peers) -> list[Tensor]:
        """Return this rank's shard [n] of the gradients of each rank."""
        shards = [region.view(self.ranks, -1)[peers.rank] for region in self._regions]
        self._regions = []  # a larger buffer may replace it
        peers.barrier()  # all have written their gradients
        for rank in peers.others():
            shards[rank] = shards[rank].clone()
        peers.barrier()  # all have read them, so they may be overwritten
        return shards


def _add(shards: Sequence[Tensor], total: Tensor) -> None:
    """Write the sum of 16-bit shards to `total`, rounded once."""
    if len(shards) == 2 and total.dtype == shards[0].dtype:
        torch.add(shards[0], shards[1], out=total)  # adds in float32
        return
    wide = total if total.dtype.itemsize >= _WIDE else total.float()
    wide.copy_(shards[0])
    for shard in shards[1:]:
        wide += shard
    total.copy_(wide)
