"""Memory that ranks share for transfers is freed as soon as nothing needs it."""

import gc
import weakref

from harness.equality import Case, Layout, build, forward_backward
from torch.multiprocessing.reductions import StorageWeakRef

from tokenyard.testing import ranks

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
