"""Copies between two ranks of one GPU: streams and kernels are those of several GPUs.

The ranks are connected by gloo. CUDA's IPC shares memory between processes of one GPU, which
symmetric memory does not.
"""

import hashlib
import os
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from harness import layout_runs as runs
from torch.multiprocessing.reductions import reduce_tensor

from tokenyard.peer_memory import PeerMemory
from tokenyard.sharded import local_part
from tokenyard.testing import ranks
from tokenyard_parallel.strategies import _peers

pytestmark = pytest.mark.gpu


def ipc_memory(size, device, group, weights=False):
    own = torch.empty(size, dtype=torch.uint8, device=device)
    handles = [None] * dist.get_world_size(group)
    dist.all_gather_object(handles, reduce_tensor(own), group=group)
    buffers = [own if r == dist.get_rank(group) else f(*a) for r, (f, a) in enumerate(handles)]
    return PeerMemory(tuple(buffers), lambda _: dist.barrier(group), weights)


def trained(settings):
    """Train on the first GPU. Return the losses, and a digest of this rank's shards."""
    recorder = runs.LossRecorder()
    with (
        patch.dict(os.environ, LOCAL_RANK="0"),
        patch.object(_peers, "peer_memory", ipc_memory),
        patch.object(_peers, "unreadable", lambda *_: None),
    ):
        runs.train_with(settings, recorder)
    digest = hashlib.sha256()
    for parameter in recorder.run.setup.model.parameters():
        shard = local_part(parameter.detach()).contiguous()
        digest.update(shard.view(torch.uint8).cpu().numpy().tobytes())
    return recorder.losses, digest.hexdigest()


@pytest.mark.parametrize("precision", ["amp_bf16", "bf16_master"])
@pytest.mark.parametrize("reshard", [True, False])
def test_copies_move_what_collectives_do(settings, tmp_path, precision, reshard):
    """Bit by bit over four steps of four microbatches, with an evaluation between them."""
    common = {"device": "cuda:0", "precision": precision, "deterministic": True}
    common |= {"device_train_microbatch_size": 1, "save_interval": "100ba"}
    results = []
    for transfers in ("copies", "collectives"):
        strategy = {"name": "fsdp", "transfers": transfers, "reshard_after_forward": reshard}
        changes = {"parallel": {"strategy": strategy}, "save_folder": str(tmp_path / transfers)}
        results.append(ranks(2).run(trained, settings | common | changes))
    assert results[0] == results[1]
