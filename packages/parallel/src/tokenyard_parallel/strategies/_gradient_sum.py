"""Sum the gradients of replicas in each backward pass.

All gradients of a group are summed by a few large collectives, on a stream of their own, while the
backward pass computes those of earlier layers. A CUDA graph can hold both. torch's DDP cannot do
this: it averages, and a second microbatch would add to the sum of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves

from tokenyard.sharded import local_part
from tokenyard_parallel._torch_private import all_gather, at_end_of_backward, may_share_memory
from tokenyard_parallel.strategies._reduce_scatter import WideReduceScatter

BUCKET = 1 << 26
"""Numbers that one collective sums: 256 MiB in float32."""

EARLY = 1 << 23
"""Numbers whose sum begins while the backward pass runs: 16 MiB in 16 bits."""

_WATCHED = "tokenyard: the gradient is summed"


class _Kind(NamedTuple):
    """What gradients that are summed together have in common."""

    group: Any  # the processes of the replicas
    dtype: torch.dtype  # of the sum


@dataclass
class _Ready:
    """Parameters of a kind whose gradients are complete, and not summed yet."""

    parameters: list[nn.Parameter] = field(default_factory=list)
    numbers: int = 0


class GradientSum:
    """Makes a backward pass add the sum over ranks to ``parameter.grad``.

    `group_of` returns the process group of a parameter's replicas. Gradients are summed in the
    dtype that the parameter has now: its weights may become 16-bit later. With `early`, sums begin
    within the backward pass: its collectives are then between those of the model.

    Every rank must get gradients for the same parameters, in the same order.
    """

    def __init__(self, model: nn.Module, group_of: Callable[[Tensor], Any], early: bool):
        self.model = model
        self.group_of = group_of
        self.early = early
        self.dtypes = {name: p.dtype for name, p in model.named_parameters()}
        self.earlier: dict[nn.Parameter, Tensor] | None = None  # set within a backward pass
        self.ready: dict[_Kind, _Ready] = {}
        self.noted: dict[nn.Parameter, bool] = {}  # whether it is summed; false for `ready`
        self.stream: torch.cuda.Stream | None = None  # of the sums
        model.register_forward_hook(self._watch)

    def _watch(self, model: nn.Module, inputs: Any, output: Any) -> None:
        self.earlier = None
        self.ready.clear()
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(self._begin)
        if torch.is_grad_enabled():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    self._watch_gradient(name, parameter)

    def _watch_gradient(self, name: str, parameter: nn.Parameter) -> None:
        """Be called when the gradient of a parameter is complete.

        The hook is on the node of this forward pass. A node that stays, as under a hook of the
        parameter, would add on the stream of the first pass, and no graph could be captured.
        """
        node: Any = get_gradient_edge(parameter).node
        if not node.metadata.get(_WATCHED):
            node.metadata[_WATCHED] = True
            node.register_hook(partial(self._add, name, parameter))

    def _begin(self, gradient: Tensor) -> None:
        """Set the gradients of earlier microbatches aside, when the backward pass begins."""
        if self.earlier is not None:
            return  # it has begun at another output
        self.noted.clear()
        self.earlier = {p: p.grad for p in self.model.parameters() if p.grad is not None}
        for parameter in self.earlier:
            parameter.grad = None
        at_end_of_backward(self._end)

    def _add(self, name: str, parameter: nn.Parameter, *_: Any) -> None:
        """Sum the gradients that are complete, if they are many."""
        if self.earlier is None or parameter.grad is None:
            return  # None: this is a backward pass from elsewhere than an output
        if parameter in self.noted:  # a reentrant recompute gives one more gradient
            if self.noted[parameter]:
                raise RuntimeError(
                    f"{name} gets another gradient from a recompute after it was summed over "
                    "ranks; recompute with use_reentrant=False"
                )
            return
        if self.early and may_share_memory(parameter.grad):
            # The rest of the backward pass may still read what the sum overwrites
            parameter.grad = parameter.grad.clone()
        kind = self._note(name, parameter, parameter.grad)
        if self.early and self.ready[kind].numbers >= EARLY:
            self._sum(kind)

    def _note(self, name: str, parameter: nn.Parameter, gradient: Tensor) -> _Kind:
        """Put a gradient with those that are complete, and return its kind."""
        kind = _Kind(self.group_of(parameter), self.dtypes[name])
        ready = self.ready.setdefault(kind, _Ready())
        ready.parameters.append(parameter)
        ready.numbers += local_part(gradient).numel()
        self.noted[parameter] = False
        return kind

    @torch.no_grad()
    def _sum(self, kind: _Kind) -> None:
        """Sum the gradients of a kind that are complete."""
        parameters = self.ready.pop(kind).parameters
        self.noted.update(dict.fromkeys(parameters, True))
        gradients = [local_part(p.grad) for p in parameters if p.grad is not None]
        if dist.get_world_size(kind.group) == 1:
            return
        device = gradients[0].device
        if device.type == "cuda" and self.stream is None:
            self.stream = torch.cuda.Stream(device)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.stream):  # does nothing without a GPU
            _sum_over_ranks(gradients, kind.dtype, kind.group)

    @torch.no_grad()
    def _end(self) -> None:
        # Graphs that the backward pass builds, as a reentrant recompute does, have other nodes
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and parameter not in self.noted:
                self._note(name, parameter, parameter.grad)
        for kind in list(self.ready):
            self._sum(kind)
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
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
