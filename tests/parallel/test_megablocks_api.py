"""MegaBlocks' API over two ranks that share the experts, against one process."""

import pytest
import torch
from harness import megablocks_runs

from tokenyard.testing import ranks


def test_expert_parallelism_computes_what_one_process_does():
    """MegaBlocks divides the gradients of experts by the number of ranks, and so does this."""
    whole = megablocks_runs.step(False, [0, 1])
    for rank, part in enumerate(ranks(2).run(megablocks_runs.parallel_step)):
        for name in (f"y{rank}", f"dx{rank}"):
            assert torch.allclose(part[name], whole[name], atol=1e-5)
        for name in ("w1", "v1", "w2"):
            key = f"experts.mlp.{name}"
            mine = whole[key].chunk(2)[rank]
            assert part[key].shape == mine.shape == (24, 8)
            assert (part[key] - mine / 2).norm() / mine.norm() < 1e-5


def test_experts_that_ranks_cannot_share_evenly(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 3)
    with pytest.raises(ValueError, match="moe_num_experts is 4, which 3 ranks cannot share evenly"):
        megablocks_runs.layer_of(True)
