"""All-gather of experts by copies from the memory of other ranks.

FSDP copies the shards of a unit into a flat buffer, gathers it by a collective, and copies the
parameters out of another one. A collective also holds multiprocessors while it runs. Here shards
are in memory that all ranks can read, and each GPU's copy engines bring those of the other ranks to
where the parameters will be. Nothing is copied out.

This uses FSDP's tensor extensions and custom collectives. The functions ``fsdp_pre_all_gather`` and
``fsdp_post_all_gather`` of a tensor return what is gathered in place of it, and the parameter. Here
one number a parameter is gathered, which is the barrier before the copies.

A shard that is gathered in the dtype in which it is stored is moved to such memory for good. It
changes in the optimizer's step alone: after the reduce-scatter, so when all ranks have read it.
Any other shard is converted into one of two regions that take turns. A rank writes to a region
again two gathers later: after the gather between, so when all ranks have read the region.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any
from weakref import proxy

import torch
from torch import Tensor, nn

from tokenyard.peer_memory import PeerMemory
from tokenyard_parallel._torch_private import all_gather, held_tensor
from tokenyard_parallel.meshes import is_shard
from tokenyard_parallel.strategies._peers import Peers

_ALIGNMENT = 256  # bytes


class CopiedGather:
    """The all-gather of a unit of FSDP, for parameters in equal shards along dimension 0."""

    def __init__(
        self,
        unit: Any,  # FSDPModule
        names: Iterable[str],
        peers: Peers,
        dtype: torch.dtype | None = None,
    ):
        self.peers = peers
        self.dtype = dtype  # in which they are gathered; None for that in which they are stored
        self.parameters = [_ParameterGather(self, unit, name) for name in names]
        self.requested: list[_ParameterGather] = []
        self.attached = False
        self.gathered = False
        self.compute: torch.cuda.Stream | None = None  # that uses the parameters
        unit.set_custom_all_gather(self)

    def attach(self) -> None:
        """Let FSDP ask the shards for what is gathered. Call it before each forward pass.

        The shards are other tensors after their dtype or device has changed. A unit that
        ``unshard`` gathered before the first call keeps FSDP's buffers, and so collectives.
        """
        if self.gathered and not self.attached:
            return
        self.attached = True
        if self.peers.device.type == "cuda":
            self.compute = torch.cuda.current_stream(self.peers.device)
        for parameter in self.parameters:
            parameter.attach()

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a buffer for a number of each parameter and rank, and what else is gathered."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> None:
        """Gather the parameters that FSDP has requested, and what it has put into a buffer."""
        self.gathered = True
        if self.compute is not None:  # it may still use the memory that parameters get
            torch.cuda.current_stream(self.peers.device).wait_stream(self.compute)
        requested = self.requested
        self.requested = []
        converted = [parameter for parameter in requested if parameter.memory is None]
        if converted:
            self._convert(converted)
        all_gather(output_tensor, input_tensor, group)
        for parameter in requested:
            parameter.copy()

    def _convert(self, parameters: Sequence[_ParameterGather]) -> None:
        """Write shards in the dtype in which they are gathered to memory of all ranks."""
        ends = [0]
        for parameter in parameters:
            size = parameter.shard.numel() * parameter.dtype.itemsize
            ends.append(ends[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
        regions = self.peers.shards.next(ends[-1])
        for parameter, begin in zip(parameters, ends):
            end = begin + parameter.shard.numel() * parameter.dtype.itemsize
            parameter.shards = [region[begin:end].view(parameter.dtype) for region in regions]
            parameter.shards[self.peers.rank].copy_(parameter.shard.reshape(-1))


def attach_before_forward(model: nn.Module, gathers: Sequence[CopiedGather]) -> None:
    """Attach all gathers before each forward pass of a model, and before FSDP's own hook."""

    def attach(*_: Any) -> None:
        for gather in gathers:
            gather.attach()

    if gathers:
        model.register_forward_pre_hook(attach, prepend=True)


class _ParameterGather:
    """The gather of one parameter by copies."""

    def __init__(self, gather: CopiedGather, unit: Any, name: str):
        self.gather = gather
        self.unit = unit
        self.name = name
        self.memory: PeerMemory | None = None  # that the shards were moved to
        self.shard: Tensor  # of this rank
        self.dtype: torch.dtype  # in which it is gathered
        self.shards: list[Tensor] = []  # [n] of each rank, in memory of all ranks
        self.whole: Tensor | None = None  # [ranks * n]
        self.number: Tensor | None = None  # [1], what FSDP gathers instead

    def attach(self) -> None:
        parameter = self.unit.get_parameter(self.name)
        if not is_shard(parameter):
            return
        shard: Any = held_tensor(parameter)
        if hasattr(shard, "fsdp_pre_all_gather"):
            return
        self.dtype = self.gather.dtype or shard.dtype
        self.memory = None
        if shard.dtype == self.dtype:
            self.memory = self.gather.peers.place(shard)
            self.shards = [buffer.view(self.dtype) for buffer in self.memory.buffers]
        self.shard = shard.detach()
        # Python cannot free a cycle through a tensor that torch refers to, too
        weak_self = proxy(self)
        shard.fsdp_pre_all_gather = partial(_ParameterGather.request, weak_self)
        shard.fsdp_post_all_gather = partial(_ParameterGather.result, weak_self)

    def request(
        self, mesh: Any, size: Any, stride: Any, module: Any, policy: Any
    ) -> tuple[tuple[Tensor, ...], None]:
        """Request the parameter; return what FSDP gathers instead of the shard."""
        self.gather.requested.append(self)
        if self.number is None or self.number.dtype != self.dtype:
            self.number = torch.zeros(1, dtype=self.dtype, device=self.shard.device)
        return (self.number,), None

    def result(
        self, gathered: Any, metadata: Any, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Any:
        """Return the parameter [ranks * n], and what FSDP frees when it reshards."""
        return None if out is not None else (self.whole, (self.whole,))

    def copy(self) -> None:
        """Copy the shards of all ranks to where the parameter will be."""
        peers = self.gather.peers
        # FSDP frees the memory while that stream may use it, so it must be memory of that stream
        with torch.cuda.stream(self.gather.compute):  # does nothing without a GPU
            whole = self._allocate(peers.ranks * self.shard.numel())
        rows = whole.data.view(peers.ranks, -1)  # autograd counts no change of it
        for rank in (*peers.others(), peers.rank):
            rows[rank].copy_(self.shards[rank])
        if self.memory is None:
            self.shards = []  # a larger buffer may replace it

    def _allocate(self, size: int) -> Tensor:
        if self.whole is None:
            self.whole = torch.empty(size, dtype=self.dtype, device=self.shard.device)
        elif self.whole.untyped_storage().size() == 0:
            self.whole.untyped_storage().resize_(size * self.dtype.itemsize)
        return self.whole
