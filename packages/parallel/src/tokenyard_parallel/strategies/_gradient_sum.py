"""Sum the gradients of replicas over ranks, while the backward pass goes on.

The gradients of a block are summed together when the backward pass leaves it, and all others at its
end. So the host calls few collectives, nothing is called for each parameter, and a CUDA graph can
hold all of it. torch's DDP averages, so a second microbatch would add to the sum of all ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tokenyard.sharded import local_part
from tokenyard_parallel._torch_private import all_gather_into, at_end_of_backward
from tokenyard_parallel.strategies._reduce_scatter import WideReduceScatter

BUCKET = 1 << 26
"""Numbers that one collective sums: 256 MiB in float32."""


class GradientSum:
    """Makes a backward pass add the sum over ranks to ``parameter.grad``.

    `group_of` returns the process group of a parameter's replicas. Gradients are summed in the
    dtype that the parameter has now: its weights may become 16-bit later. On a GPU, a stream of its
    own sums them.

    Every rank must get gradients for the same parameters.
    """

    def __init__(self, model: nn.Module, group_of: Callable[[Tensor], Any]):
        self.model = model
        self.group_of = group_of
        self.dtypes = {name: p.dtype for name, p in model.named_parameters()}
        self.earlier: dict[nn.Parameter, Tensor] | None = None  # set within a backward pass
        self.summed: set[str] = set()
        self.calls: Counter[nn.Module] = Counter()  # of each block in a forward pass
        self.stream: torch.cuda.Stream | None = None
        model.register_forward_pre_hook(self._forget)
        model.register_forward_hook(self._watch)
        for block, names in _own_parameters(model).items():
            block.register_forward_pre_hook(partial(self._watch_input, names))

    def _forget(self, model: nn.Module, inputs: Any) -> None:
        """Forget a backward pass that failed."""
        self.earlier = None
        self.calls.clear()

    def _watch(self, model: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in _differentiable(output):
            tensor.register_hook(self._begin)

    def _watch_input(self, names: Sequence[str], block: nn.Module, inputs: Any) -> None:
        self.calls[block] += 1
        for tensor in _differentiable(inputs)[:1]:
            tensor.register_hook(lambda _: self._leave(block, names))

    def _begin(self, gradient: Tensor) -> None:
        """Set the gradients of earlier microbatches aside, when the backward pass begins."""
        if self.earlier is not None:
            return  # it has begun at another output
        self.earlier = {p: p.grad for p in self.model.parameters() if p.grad is not None}
        for parameter in self.earlier:
            parameter.grad = None
        self.summed.clear()
        if gradient.is_cuda and self.stream is None:
            self.stream = torch.cuda.Stream(gradient.device)
        at_end_of_backward(self._end)

    def _leave(self, block: nn.Module, names: Sequence[str]) -> None:
        """Sum the gradients of a block: that of its input is complete, so they are too.

        The engine runs the nodes of later operators first, and writes a gradient at once.
        """
        if self.earlier is not None and self.calls[block] == 1:
            self._sum(names)

    @torch.no_grad()
    def _sum(self, names: Sequence[str]) -> None:
        parameters = dict(self.model.named_parameters())
        gradients: dict[tuple[Any, torch.dtype], list[Tensor]] = {}
        for name in names:
            parameter = parameters[name]
            if parameter.grad is not None:
                key = (self.group_of(parameter), self.dtypes[name])
                gradients.setdefault(key, []).append(local_part(parameter.grad))
        self.summed.update(names)
        with self._own_stream():
            for (group, dtype), tensors in gradients.items():
                if dist.get_world_size(group) > 1:
                    _sum_over_ranks(tensors, dtype, group)

    def _own_stream(self) -> AbstractContextManager[Any]:
        """Context: run after the work so far, and beside the work to come."""
        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        return torch.cuda.stream(self.stream)

    @torch.no_grad()
    def _end(self) -> None:
        self._sum([name for name, _ in self.model.named_parameters() if name not in self.summed])
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
        earlier, self.earlier = self.earlier or {}, None
        for parameter, gradient in earlier.items():
            if parameter.grad is not None:
                gradient += parameter.grad
            parameter.grad = gradient


def _own_parameters(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return the names of each block's parameters, without those that other modules share."""
    users = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    own = {id(p): name for name, p in model.named_parameters() if users[id(p)] == 1}
    return {
        block: [own[id(p)] for p in block.parameters() if id(p) in own]
        for block in getattr(model, "blocks", ())
    }


def _differentiable(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.requires_grad]


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
    WideReduceScatter(ranks, dtype)(shard, flat, group, dist.ReduceOp.SUM)
    all_gather_into(flat, shard.to(flat.dtype), group)


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
