"""Memory that ranks share for transfers is freed as soon as nothing needs it."""

import gc
import weakref
from unittest.mock import patch

import torch
import torch.distributed as dist
from harness.equality import Case, Layout, build, forward_backward
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tokenyard.testing import ranks
from tokenyard_parallel.strategies import _peers
from tokenyard_parallel.strategies._peers import Peers
from tokenyard_parallel.strategies._reduce_scatter import WideReduceScatter

CPU = torch.device("cpu")
COPIES = Layout("fsdp", 2, transfers="copies")


def freed_after_a_pass():
    """Return whether a model, and its experts' memory, are freed after a pass."""
    strategy, model = build(COPIES, Case())
    forward_backward(strategy, model, Case())
    shard = model.blocks[0].moe.experts.up.to_local()
    freed = [weakref.ref(model), StorageWeakRef(shard.untyped_storage())]
    del strategy, model, shard
    gc.collect()
    return [freed[0]() is None, freed[1].expired()]


def test_a_model_is_freed():
    assert ranks(2).run(freed_after_a_pass) == [[True, True]] * 2


def storages(tensors: list[Tensor] | tuple[Tensor, ...]) -> list[StorageWeakRef]:
    return [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]


def reduced(reduce, size):
    """Reduce gradients of `size` numbers."""
    gradients = reduce.allocate((size,), dtype=torch.bfloat16, device=CPU)
    total = reduce.allocate((size // reduce.ranks,), dtype=torch.bfloat16, device=CPU)
    reduce(total, gradients.zero_(), dist.group.WORLD, dist.ReduceOp.SUM)


def freed_before_growth():
    """Return whether the buffer of a small unit is freed when that of a large one is allocated."""
    peers = Peers(dist.group.WORLD, CPU)
    small, large = (WideReduceScatter(2, peers) for _ in range(2))
    reduced(small, 8)
    old = storages(peers.gradients.memory.buffers)
    freed: list[bool] = []
    share = peers.share

    def sharing(size):
        freed.extend(storage.expired() for storage in old)
        return share(size)

    with patch.object(peers, "share", sharing):
        reduced(large, 800)
    return freed


def test_a_small_buffer_is_freed_before_a_larger_one_is_allocated():
    assert ranks(2).run(freed_before_growth) == [[True, True]] * 2


def calls_of_place():
    """Return the order of calls that place two tensors in shared memory."""
    calls: list[str] = []
    peers = Peers(dist.group.WORLD, CPU)
    allocate = _peers.peer_memory

    def allocating(*args):
        calls.append("allocate")
        return allocate(*args)

    with (
        patch.object(_peers, "peer_memory", allocating),
        patch.object(torch.cuda, "empty_cache", lambda: calls.append("empty cache")),
    ):
        for _ in range(2):
            peers.place(torch.ones(4))
    return calls


def test_memory_that_torch_keeps_is_given_back_first():
    """Shared memory comes from the driver, which has no other once torch keeps old shards."""
    assert ranks(2).run(calls_of_place) == [["empty cache", "allocate"] * 2] * 2
