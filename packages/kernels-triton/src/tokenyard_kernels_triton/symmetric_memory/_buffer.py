"""Buffers that all ranks of a group can read: symmetric memory of GPUs, or a shared file on CPUs.

A trip of rows is: write to the next region of a link, `barrier`, read the regions of all ranks. Two
regions take turns, so one barrier a trip is enough. A rank writes to a region again two trips
later. It has passed the barrier of the trip between, and so every rank had read the region before.
Each rank runs its trips in the same order on one stream.
"""

from __future__ import annotations

from functools import cache, partial
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokenyard.errors import BackendError
from tokenyard.peer_memory import PeerMemory, peer_memory
from tokenyard_kernels_triton.symmetric_memory._region import Region, Sizes, layout_of

REGIONS = 2  # of a buffer, which take turns

_SPARE = 60.0  # seconds that a barrier of GPUs waits longer than the host


class SymmetricBuffer:
    """A buffer of two regions on every rank of a group."""

    def __init__(self, group: Any, device: torch.device):
        self.group = group
        self.device = device
        self.rank = dist.get_rank(group)
        self.ranks = dist.get_world_size(group)
        self.region_bytes = 0
        self.trips = 0
        self.generation = 0  # of the memory: it is replaced by a larger one
        self.addresses = torch.empty(0, dtype=torch.int64, device=device)
        self._memory: PeerMemory | None = None
        self._barrier: Any = None

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """The buffer of each rank, [n] uint8; none before the first `reserve`."""
        return () if self._memory is None else self._memory.buffers

    def reserve(self, sizes: Sizes, timeout: float) -> None:
        """Make regions large enough. It is a collective; all ranks pass the same sizes.

        The host ends a wait for other ranks after `timeout` seconds. On a GPU a barrier has more.
        """
        region_bytes = layout_of(sizes).bytes
        if region_bytes <= self.region_bytes:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        dist.barrier(self.group)  # peers may still read the old buffer
        self._memory = self._barrier = None  # it is freed first
        self._memory = _allocate(REGIONS * region_bytes, self.device, self.group)
        self._barrier = partial(self._memory.barrier, int(1000 * (timeout + _SPARE)))
        addresses = [buffer.data_ptr() for buffer in self.buffers]
        self.addresses = torch.tensor(addresses, dtype=torch.int64, device=self.device)
        self.region_bytes = region_bytes
        self.generation += 1

    def barrier(self) -> None:
        """Wait for all ranks: on a GPU the stream waits, not the host.

        A stream that waits too long fails with an error of its device, which names no rank. So the
        host, which knows more, should have ended the process before.
        """
        self._barrier()


class Link:
    """The trips of exchanges of some sizes through a buffer."""

    def __init__(self, buffer: SymmetricBuffer, sizes: Sizes):
        self.buffer = buffer
        self.sizes = sizes
        self.barrier = buffer.barrier
        self.generation = -1  # of the buffer's memory that the regions are in
        self.regions: tuple[Region, Region]

    def next_region(self) -> Region:
        """Return the region of the next trip."""
        buffer = self.buffer
        if self.generation != buffer.generation:
            self.generation = buffer.generation
            self.regions = (self._region(0), self._region(buffer.region_bytes))
        buffer.trips += 1
        return self.regions[buffer.trips % 2]

    def _region(self, start: int) -> Region:
        buffer = self.buffer
        key = next(_keys)
        return Region(key, self.sizes, buffer.rank, start, buffer.buffers, buffer.addresses)


_keys = count()
_links: list[Link] = []
"""What an operator refers to by a number, since its arguments are tensors and numbers."""


def link(number: int) -> Link:
    """Return the link of a number."""
    return _links[number]


def connect(group: Any, sizes: Sizes, device: torch.device, timeout: float) -> int:
    """Reserve memory for trips of some sizes; return the number of their link. A collective.

    `timeout` is how many seconds the host may wait for other ranks.
    """
    buffer = _buffer(group, device)
    buffer.reserve(sizes, timeout)
    return _link_number(buffer, sizes)


@cache  # an entry that is dropped would leave ranks with different buffers
def _buffer(group: Any, device: torch.device) -> SymmetricBuffer:
    return SymmetricBuffer(group, device)


@cache
def _link_number(buffer: SymmetricBuffer, sizes: Sizes) -> int:
    _links.append(Link(buffer, sizes))
    return len(_links) - 1


def _allocate(size: int, device: torch.device, group: Any) -> PeerMemory:
    try:
        return peer_memory(size, device, group)
    except BackendError as error:
        raise BackendError(
            f"the exchange symmetric_memory: {error}; give backends.exchange: all_to_all_tokens"
        ) from error
