"""Memory that ranks read of each other, and why they cannot."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from tokenyard import peer_memory
from tokenyard.testing import ranks

CPU = torch.device("cpu")


def read_all(size):
    """Write the own rank to a buffer; return what all buffers begin and end with."""
    memory = peer_memory.peer_memory(size, CPU, dist.group.WORLD)
    memory.buffers[dist.get_rank()].fill_(dist.get_rank() + 1)
    memory.barrier(60_000)
    return [(buffer.numel(), *buffer[[0, -1]].tolist()) for buffer in memory.buffers]


@pytest.mark.parametrize("size", [1, 300, 5000])
def test_each_rank_reads_what_the_others_wrote(size):
    expected = [(size, rank, rank) for rank in (1, 2, 3)]
    assert ranks(3).run(read_all, size) == [expected] * 3


def counted():
    """Return the bytes that are counted for two new buffers, for one, and for none."""
    before = peer_memory.shared_bytes(CPU), peer_memory.shared_bytes(CPU, weights=False)
    weights = peer_memory.peer_memory(100, CPU, dist.group.WORLD, weights=True)
    buffer = peer_memory.peer_memory(30, CPU, dist.group.WORLD)
    counts = [peer_memory.shared_bytes(CPU)]
    counts_of_buffers = peer_memory.shared_bytes(CPU, weights=False) - before[1]
    del weights
    counts.append(peer_memory.shared_bytes(CPU))
    del buffer
    counts.append(peer_memory.shared_bytes(CPU))
    return [count - before[0] for count in counts], counts_of_buffers


def test_buffers_are_counted_until_they_are_freed():
    assert ranks(2).run(counted) == [([130, 30, 0], 30)] * 2


def reason(nodes):
    """Return why ranks cannot read each other's memory, of which each is on one of `nodes`."""
    node = nodes[dist.get_rank()]
    with patch.object(peer_memory, "node_number", lambda: node):
        return peer_memory.unreadable(CPU, dist.group.WORLD)


def test_ranks_of_one_node_read_it():
    assert ranks(2).run(reason, (5, 5)) == [None, None]


def test_ranks_of_several_nodes_do_not():
    assert ranks(2).run(reason, (5, 6)) == ["they are on several nodes"] * 2


def test_gpus_read_each_other_if_each_process_sees_all_of_them():
    with (
        patch.object(torch.cuda, "device_count", lambda: 2),
        patch.object(torch.cuda, "can_device_access_peer", lambda gpu, peer: peer == 1),
    ):
        assert [peer_memory._can_read(0, peer) for peer in (0, 1, 2)] == [True, True, False]
        assert not peer_memory._can_read(1, 0)
