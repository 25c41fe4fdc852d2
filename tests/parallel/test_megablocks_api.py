"""MegaBlocks' API over two ranks that share the experts, against one process."""

import pytest
import torch
import torch.distributed as dist
from harness import megablocks_runs
from harness.megablocks_runs import TOP_K

from tokenyard.testing import ranks
from tokenyard_models.megablocks import MoE, dMoE
from tokenyard_models.megablocks.layers.common import exchange_request
from tokenyard_parallel import fake_world


@pytest.mark.parametrize(
    ("kind", "counts", "capacity"), [(dMoE, [7, 8], 1), (MoE, [8, 8], 0.5), (MoE, [7, 8], 0)]
)
def test_expert_parallelism_computes_what_one_process_does(kind, counts, capacity):
    """MegaBlocks divides the gradients of experts by the number of ranks, and so does this.

    Over ranks it counts slots, not tokens, for a capacity, which makes it K times as large.
    """
    tokens = [megablocks_runs.tokens_of(rank, count) for rank, count in enumerate(counts)]
    layer = megablocks_runs.layer_of(kind, False, capacity * TOP_K)
    whole = megablocks_runs.step(layer, tokens)
    parts = ranks(2).run(megablocks_runs.parallel_step, kind, counts, capacity)
    for name in ("y", "dx"):
        have = torch.cat([part[name] for part in parts])
        assert (have - whole[name]).norm() / whole[name].norm() < 1e-5
    router = sum(part["router.layer.weight"] for part in parts)
    assert torch.allclose(router, whole["router.layer.weight"], rtol=1e-4, atol=1e-5)
    for rank, part in enumerate(parts):
        for name in whole.keys() - {"y", "dx", "router.layer.weight"}:
            mine = whole[name].chunk(2)[rank]
            assert part[name].shape == mine.shape
            assert (part[name] - mine / 2).norm() / mine.norm() < 1e-5


def test_slots_past_the_capacity_of_their_experts_rank():
    """Experts 0 and 1 take 2 * 0.5 * (3 * 2) * 2 / 4 = 3 slots, the others 5, in order of ranks."""
    ids = [
        torch.tensor([[0, 3], [0, 3], [0, 3]], dtype=torch.int32),
        torch.tensor([[1, 0], [1, 3], [3, 1], [3, 1], [2, 3]], dtype=torch.int32),
    ]
    first, second = ranks(2).run(megablocks_runs.parallel_capacity, ids, 0.5)
    assert torch.equal(first, ids[0])
    assert second.tolist() == [[1, 4], [1, 3], [3, 1], [4, 4], [2, 4]]


def test_experts_that_ranks_cannot_share_evenly(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 3)
    with pytest.raises(ValueError, match="moe_num_experts is 4, which 3 ranks cannot share evenly"):
        megablocks_runs.layer_of(dMoE, True)


def test_ranks_that_are_no_neighbours_get_an_exchange_for_several_nodes():
    """A workload says how many ranks share experts, and not which: auto expects neighbours."""
    with fake_world(4):
        assert exchange_request(dist.group.WORLD) == "auto"
        assert exchange_request(dist.new_group([2, 3])) == "auto"
        assert exchange_request(dist.new_group([1, 2])) == "all_to_all_tokens"
        assert exchange_request(dist.new_group([0, 2])) == "all_to_all_tokens"
