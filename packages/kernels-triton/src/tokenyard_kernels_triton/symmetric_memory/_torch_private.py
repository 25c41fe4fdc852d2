"""Private names of torch that the exchange uses: torch 2.10 to 2.13."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tokenyard.processes import disable_multicast

_DEFAULT = 1800.0  # seconds, that of torch


def group_timeout(group: Any, device: torch.device) -> float:
    """Return how many seconds a collective of a process group may take."""
    if group is None or dist.get_backend(group) == "fake":  # a plan
        return _DEFAULT
    timeout: timedelta = group._get_backend(device).options._timeout
    return timeout.total_seconds()


def in_backward() -> bool:
    """Return whether a backward pass runs in this thread. torch's checkpoint asks the same way."""
    task: int = torch._C._current_graph_task_id()
    return task != -1


class SymmetricMemory(NamedTuple):
    """Memory of each rank of a group that all of them can read."""

    buffers: tuple[Tensor, ...]  # [n] uint8, the buffer of each rank
    barrier: Callable[[int], None]  # takes a timeout in milliseconds; the stream waits


def symmetric_memory(size: int, device: torch.device, group: Any) -> SymmetricMemory:
    """Allocate `size` bytes on the GPU of each rank of a group; a collective.

    Uses neither multicast nor NVSHMEM.
    """
    from torch._C._distributed_c10d import _SymmetricMemory

    disable_multicast()
    own = _SymmetricMemory.empty_strided_p2p((size,), [1], torch.uint8, device, group.group_name)
    memory = _SymmetricMemory.rendezvous(own)
    buffers = tuple(
        own if rank == memory.rank else memory.get_buffer(rank, (size,), torch.uint8)
        for rank in range(memory.world_size)
    )

    def barrier(milliseconds: int) -> None:
        memory.barrier(0, milliseconds)

    return SymmetricMemory(buffers, barrier)
