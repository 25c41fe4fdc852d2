"""Memory from which the ranks of a group copy each other's shards and gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokenyard import BackendError, ConfigError
from tokenyard.peer_memory import PeerMemory, peer_memory, unreadable
from tokenyard_parallel._torch_private import all_gather

TRANSFERS = ("auto", "copies", "collectives")


class Peers:
    """The ranks of a group, which read each other's memory, and the index of this rank."""

    def __init__(self, group: Any, device: torch.device):
        self.group = group
        self.device = device
        self.rank = dist.get_rank(group)
        self.ranks = dist.get_world_size(group)
        self.shards = Regions(self, 2)
        self.gradients = Regions(self, 1)

    def place(self, shard: Tensor) -> PeerMemory:
        """Move a tensor to memory of all ranks. A collective.

        Raises BackendError if the memory cannot be shared.
        """
        memory = self.share(shard.nbytes, weights=True)
        own = memory.buffers[self.rank].view(shard.dtype).view(shard.shape)
        own.copy_(shard)
        shard.data = own
        return memory

    def share(self, size: int, weights: bool = False) -> PeerMemory:
        """Allocate `size` bytes on every rank. A collective. Raises BackendError."""
        # torch takes this memory from the driver, so what it keeps for later must go back first
        torch.cuda.empty_cache()  # does nothing without a GPU
        try:
            return peer_memory(size, self.device, self.group, weights)
        except BackendError as error:
            raise BackendError(
                f"{error}; give parallel.strategy: {{name: fsdp, transfers: collectives}}"
            ) from error

    def others(self) -> list[int]:
        """Return the other ranks. Each rank begins with another one."""
        return [(self.rank + step) % self.ranks for step in range(1, self.ranks)]

    def barrier(self) -> None:
        """Wait for all ranks: on a GPU the stream waits, not the host."""
        number = torch.zeros(1, device=self.device)
        all_gather(number.new_empty(self.ranks), number, self.group)


class Regions:
    """Equal regions of a buffer of every rank, which take turns."""

    def __init__(self, peers: Peers, count: int):
        self.peers = peers
        self.count = count
        self.turns = 0
        self.region_bytes = 0
        self.memory: PeerMemory | None = None

    def next(self, size: int) -> list[Tensor]:
        """Return the next region [size] uint8 of each rank.

        It is a collective if the buffer must grow. Raises BackendError if it cannot.
        """
        if self.memory is None or size > self.region_bytes:
            self.memory = self._grow(size)
            self.region_bytes = size
        begin = self.turns % self.count * self.region_bytes
        self.turns += 1
        return [buffer[begin : begin + size] for buffer in self.memory.buffers]

    def _grow(self, size: int) -> PeerMemory:
        peers = self.peers
        if peers.device.type == "cuda":
            torch.cuda.synchronize(peers.device)
        dist.barrier(peers.group)  # others may still read the old buffer
        self.memory = None  # the old one is freed first
        return peers.share(self.count * size)


def peers_of(transfers: str, device: torch.device, group: Any) -> Peers | None:
    """Return the ranks of a group as peers, or None if collectives move their parameters.

    `transfers` is one of `TRANSFERS`. It is a collective of the group. Raises ConfigError if it is
    copies, and ranks cannot read each other's memory.
    """
    backend = dist.get_backend(group)
    if transfers == "collectives" or dist.get_world_size(group) == 1 or backend == "fake":
        return None
    if transfers == "auto" and backend != "nccl":
        return None
    if (reason := unreadable(device, group)) is None:
        return Peers(group, device)
    if transfers == "auto":
        return None
    raise ConfigError(
        "parallel.strategy.transfers is copies, which needs ranks that read each other's memory, "
        f"and {reason}; give collectives"
    )
