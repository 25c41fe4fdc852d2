"""Sum the gradients of replicas at the end of each backward pass.

All gradients of a group are summed by a few large collectives. So the host does nothing for each
parameter between the forward and backward pass, and a CUDA graph can hold both. torch's DDP cannot
do this: it averages, and a second microbatch would add to the sum of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tokenyard.sharded import local_part
from tokenyard_parallel._torch_private import all_gather, at_end_of_backward
from tokenyard_parallel.strategies._reduce_scatter import WideReduceScatter

BUCKET = 1 << 26
"""Numbers that one collective sums: 256 MiB in float32."""


class GradientSum:
    """Makes a backward pass add the sum over ranks to ``parameter.grad``.

    `group_of` returns the process group of a parameter's replicas. Gradients are summed in the
    dtype that the parameter has now: its weights may become 16-bit later.

    Every rank must get gradients for the same parameters.
    """

    def __init__(self, model: nn.Module, group_of: Callable[[Tensor], Any]):
        self.model = model
        self.group_of = group_of
        self.dtypes = {name: p.dtype for name, p in model.named_parameters()}
        self.earlier: dict[nn.Parameter, Tensor] | None = None  # set within a backward pass
        model.register_forward_hook(self._watch)

    def _watch(self, model: nn.Module, inputs: Any, output: Any) -> None:
        self.earlier = None
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(self._begin)

    def _begin(self, gradient: Tensor) -> None:
        """Set the gradients of earlier microbatches aside, when the backward pass begins."""
        if self.earlier is not None:
            return  # it has begun at another output
        self.earlier = {p: p.grad for p in self.model.parameters() if p.grad is not None}
        for parameter in self.earlier:
            parameter.grad = None
        at_end_of_backward(self._end)

    @torch.no_grad()
    def _end(self) -> None:
        gradients: dict[tuple[Any, torch.dtype], list[Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                key = (self.group_of(parameter), self.dtypes[name])
                gradients.setdefault(key, []).append(local_part(parameter.grad))
        for (group, dtype), tensors in gradients.items():
            if dist.get_world_size(group) > 1:
                _sum_over_ranks(tensors, dtype, group)
        earlier, self.earlier = self.earlier or {}, None
        for parameter, gradient in earlier.items():
            if parameter.grad is not None:
                gradient += parameter.grad
            parameter.grad = gradient


def _sum_over_ranks(gradients: list[Tensor], dtype: torch.dtype, group: Any) -> None:
    """Replace gradients by their sums over the ranks of a group, which are computed in `dtype`."""
    ranks = dist.get_world_size(group)
    # Gradients of one microbatch have the dtype of the weights
    narrow = all(gradient.dtype.itemsize < dtype.itemsize for gradient in gradients)
    for bucket in buckets(gradients):
        sizes = [gradient.numel() for gradient in bucket]
        numel = -(-sum(sizes) // ranks) * ranks
        flat = bucket[0].new_empty(numel, dtype=bucket[0].dtype if narrow else dtype)
        parts = flat[: sum(sizes)].split(sizes)
        sums = [part.view_as(gradient) for part, gradient in zip(parts, bucket)]
        torch._foreach_copy_(sums, bucket)
        if narrow:
            sum_narrow(flat, dtype, group)
        else:
            dist.all_reduce(flat, group=group)
        torch._foreach_copy_(bucket, sums)


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
