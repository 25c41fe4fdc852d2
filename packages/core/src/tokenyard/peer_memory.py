"""Memory that all ranks of a node can read: of their GPUs, or a shared file on CPUs."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

from tokenyard.devices import with_index
from tokenyard.errors import BackendError
from tokenyard.processes import disable_multicast

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_PATH = 512  # bytes of a path, at most


@dataclass(frozen=True, eq=False)
class PeerMemory:
    """A buffer of each rank of a group, which all of them can read and write."""

    buffers: tuple[Tensor, ...]  # [n] uint8
    barrier: Callable[[int], None]  # takes a timeout in milliseconds; on a GPU the stream waits
    weights: bool  # whether it holds weights


_live: WeakSet[PeerMemory] = WeakSet()


def shared_bytes(device: torch.device, weights: bool = True) -> int:
    """Return the bytes of this process's buffers on a GPU, which torch's figures do not count.

    With `weights` false, without those that hold weights.
    """
    device = with_index(device)
    return sum(
        memory.buffers[0].nbytes
        for memory in _live
        if memory.buffers[0].device == device and (weights or not memory.weights)
    )


def node_number() -> int:
    """Return a number of this machine that differs from that of others."""
    name = _BOOT.read_text(encoding="ascii") if _BOOT.exists() else platform.node()
    return int.from_bytes(name.strip().encode()[-7:], "big")


def unreadable(device: torch.device, group: Any) -> str | None:
    """Return why ranks of a group cannot read each other's memory, or None if they can.

    It is a collective of the group, with a host sync. All ranks get a reason, or none does.
    """
    index = with_index(device).index if device.type == "cuda" else dist.get_rank(group)
    own = torch.tensor([node_number(), index], device=device)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    nodes, indices = torch.stack(gathered, 1).tolist()
    if len(set(nodes)) > 1:
        return "they are on several nodes"
    if len(set(indices)) < len(indices):
        return "some of them do not see the GPUs of the others (CUDA_VISIBLE_DEVICES)"
    reads = device.type != "cuda" or all(_can_read(index, peer) for peer in indices)
    all_read = torch.tensor(int(reads), device=device)
    dist.all_reduce(all_read, dist.ReduceOp.MIN, group=group)
    return None if all_read.item() else "some GPUs cannot read the memory of others"


def _can_read(index: int, peer: int) -> bool:
    if index == peer:
        return True
    return peer < torch.cuda.device_count() and torch.cuda.can_device_access_peer(index, peer)


def peer_memory(size: int, device: torch.device, group: Any, weights: bool = False) -> PeerMemory:
    """Allocate `size` bytes on every rank of a group. It is a collective.

    Keep the result as long as the buffers: `shared_bytes` counts it. On GPUs this is torch's
    symmetric memory, without multicast and NVSHMEM; its names are private: torch 2.10 to 2.13.
    Raises BackendError if the memory cannot be shared.
    """
    if device.type == "cuda":
        buffers, barrier = _symmetric_memory(size, device, group)
    else:
        buffers = _shared_file(size, group)
        barrier = partial(_barrier_of_hosts, group)
    memory = PeerMemory(buffers, barrier, weights)
    _live.add(memory)
    return memory


def _symmetric_memory(size: int, device: torch.device, group: Any) -> tuple[Any, Any]:
    from torch._C._distributed_c10d import _SymmetricMemory

    disable_multicast()
    try:
        own = _SymmetricMemory.empty_strided_p2p(
            (size,), [1], torch.uint8, device, group.group_name
        )
        memory = _SymmetricMemory.rendezvous(own)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise BackendError(
            f"{size:,} bytes of GPU memory cannot be shared between ranks ({reason})"
        ) from error
    buffers = tuple(
        own if rank == memory.rank else memory.get_buffer(rank, (size,), torch.uint8)
        for rank in range(memory.world_size)
    )
    return buffers, partial(memory.barrier, 0)


def _barrier_of_hosts(group: Any, milliseconds: int) -> None:
    dist.barrier(group)


def _shared_file(size: int, group: Any) -> tuple[Tensor, ...]:
    """Return a buffer [size] uint8 of each rank: parts of a file that all ranks map."""
    rank = dist.get_rank(group)
    ranks = dist.get_world_size(group)
    path = torch.zeros(_PATH, dtype=torch.uint8)
    if rank == 0:
        file, name = tempfile.mkstemp(prefix="tokenyard-")
        os.truncate(file, ranks * size)
        os.close(file)
        path[: len(name.encode())] = torch.tensor(list(name.encode()), dtype=torch.uint8)
    dist.broadcast(path, group_src=0, group=group)
    name = bytes(path.tolist()).rstrip(b"\0").decode()
    whole = torch.from_file(name, shared=True, size=ranks * size, dtype=torch.uint8)
    dist.barrier(group)
    if rank == 0:
        os.unlink(name)  # the memory stays until all ranks unmap it
    return whole.chunk(ranks)
