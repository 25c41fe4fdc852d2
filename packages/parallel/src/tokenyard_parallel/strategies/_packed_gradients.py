"""Gradients side by side in one tensor, so that one collective sums many of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokenyard_parallel._torch_private import all_gather
from tokenyard_parallel.strategies._reduce_scatter import WideReduceScatter

BUCKET = 1 << 26
"""Numbers that one collective sums: 256 MiB in float32."""

_ALIGNMENT = 16  # bytes: kernels read as many at once


class PackedGradients:
    """Copies of gradients that have one dtype, until they are replaced by their sums.

    `parts` are views, shaped like the gradients. The gradients themselves stay as they are: another
    tensor may have their memory.
    """

    def __init__(self, gradients: Sequence[Tensor], ranks: int):
        first = gradients[0]
        unit = _ALIGNMENT // first.dtype.itemsize
        padded = [-(-gradient.numel() // unit) * unit for gradient in gradients]
        self.flat = first.new_empty(-(-sum(padded) // ranks) * ranks)
        starts = accumulate(padded, initial=0)
        self.parts = [
            self.flat[start : start + gradient.numel()].view(gradient.shape)
            for start, gradient in zip(starts, gradients)
        ]
        torch._foreach_copy_(self.parts, list(gradients))

    def sum(self, dtype: torch.dtype, group: Any) -> None:
        """Replace the copies by their sums over the ranks of a group.

        They are computed in `dtype`, or in that of the gradients, whichever is wider.
        """
        if self.flat.dtype.itemsize < dtype.itemsize:
            sum_narrow(self.flat, dtype, group)
        else:
            dist.all_reduce(self.flat, group=group)


def sum_narrow(flat: Tensor, dtype: torch.dtype, group: Any) -> None:
    """Replace 16-bit numbers [ranks * n] by their sums over ranks, computed in `dtype`.

    Each rank sums a shard. So the sums are rounded once, and half as many bytes travel as in an
    all-reduce in float32.
    """
    ranks = dist.get_world_size(group)
    shard = torch.empty(flat.numel() // ranks, dtype=dtype, device=flat.device)
    WideReduceScatter(ranks, None)(shard, flat, group, dist.ReduceOp.SUM)
    all_gather(flat, shard.to(flat.dtype), group)


def buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield consecutive tensors of at most BUCKET numbers together, and larger ones alone."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
            size = 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
