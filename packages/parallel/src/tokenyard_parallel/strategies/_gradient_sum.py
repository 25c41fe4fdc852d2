"""Sum the gradients of replicas in each backward pass.

All gradients of a group are summed by a few large collectives, on a stream of their own, while the
backward pass computes those of earlier layers. A CUDA graph can hold both. torch's DDP cannot do
this: it averages, and a second microbatch would add to the sum of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves

from tokenyard.sharded import is_sharded, local_part
from tokenyard_parallel._torch_private import at_end_of_backward
from tokenyard_parallel.strategies._packed_gradients import PackedGradients, buckets

EARLY = 1 << 23
"""Numbers whose sum begins while the backward pass runs: 16 MiB in 16 bits."""

_WATCHED = "tokenyard: the gradient is summed"


class _Kind(NamedTuple):
    """What gradients that are summed together have in common."""

    group: Any  # the processes of the replicas
    dtype: torch.dtype  # in which they are summed
    gradient: torch.dtype


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
        self.stream: torch.cuda.Stream | None = None  # of early sums
        self.packed: list[PackedGradients] = []  # whose sums the stream may not have computed
        model.register_forward_hook(self._watch)

    def _watch(self, model: nn.Module, inputs: Any, output: Any) -> None:
        self.earlier = None
        self.ready.clear()
        self._wait()  # after a backward pass that failed
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
        kind = self._note(name, parameter, parameter.grad)
        if self.early and self.ready[kind].numbers >= EARLY:
            self._sum(kind)

    def _note(self, name: str, parameter: nn.Parameter, gradient: Tensor) -> _Kind:
        """Put a gradient with those that are complete, and return its kind."""
        kind = _Kind(self.group_of(parameter), self.dtypes[name], gradient.dtype)
        ready = self.ready.setdefault(kind, _Ready())
        ready.parameters.append(parameter)
        ready.numbers += local_part(gradient).numel()
        self.noted[parameter] = False
        return kind

    @torch.no_grad()
    def _sum(self, kind: _Kind) -> None:
        """Replace the gradients of a kind that are complete by their sums.

        The rest of the backward pass may read the memory of a gradient, which may be a view. So
        sums have memory of their own. A shard, which is summed at the end, keeps its own.
        """
        parameters = self.ready.pop(kind).parameters
        self.noted.update(dict.fromkeys(parameters, True))
        ranks = dist.get_world_size(kind.group)
        if ranks == 1:
            return
        owners = iter(parameters)
        for bucket in buckets(local_part(p.grad) for p in parameters if p.grad is not None):
            packed = PackedGradients(bucket, ranks)
            with self._beside(packed):
                packed.sum(kind.dtype, kind.group)
                for gradient, part, parameter in zip(bucket, packed.parts, owners):
                    if is_sharded(parameter):
                        gradient.copy_(part)
                    else:
                        parameter.grad = part

    def _beside(self, packed: PackedGradients) -> AbstractContextManager[None]:
        """Return a context for early sums, which a GPU computes beside the backward pass."""
        device = packed.flat.device
        if not self.early or device.type != "cuda":
            return nullcontext()
        if self.stream is None:
            self.stream = torch.cuda.Stream(device)
        self.packed.append(packed)
        self.stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(self.stream)

    def _wait(self) -> None:
        """Let the current stream wait for all sums, whose memory may then be freed."""
        if self.stream is not None and self.packed:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
        self.packed.clear()

    @torch.no_grad()
    def _end(self) -> None:
        # Graphs that the backward pass builds, as a reentrant recompute does, have other nodes
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and parameter not in self.noted:
                self._note(name, parameter, parameter.grad)
        for kind in list(self.ready):
            self._sum(kind)
        self._wait()
        earlier, self.earlier = self.earlier or {}, None
        for parameter, gradient in earlier.items():
            if parameter.grad is not None:
                gradient += parameter.grad
            parameter.grad = gradient
