"""Initial weights: the same for any sharding, with the right scales."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from tokenyard_models import Dbrx, Mpt


@pytest.fixture
def rank_3_of_4():
    """Act as rank 3 of a mesh of 2 (shards) by 2 (expert parallel), in one process."""
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)
    yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("shards", "experts"))
    dist.destroy_process_group()


def sharded(
    parameter: nn.Parameter, mesh: DeviceMesh, placements: list[Placement], shape: list[int]
) -> nn.Parameter:
    local = torch.full(shape, math.nan)
    whole = {"shape": parameter.shape, "stride": parameter.stride()}
    return nn.Parameter(DTensor.from_local(local, mesh, placements, run_check=False, **whole))


def test_a_rank_fills_its_shards_of_a_model(rank_3_of_4):
    """Shard as FSDP2 does: experts by expert parallelism and then by expert or row, others by row.

    The vocabulary has 257 rows: 129 on one rank and 128 on the other.
    """
    whole = Dbrx({"size": "tiny"})
    model = Dbrx({"size": "tiny"})
    first = model.blocks[0].ffn.experts
    second = model.blocks[1].ffn.experts
    by_expert = [_StridedShard(0, split_factor=2), Shard(0)]
    by_row = [Shard(1), Shard(0)]
    first.up = sharded(first.up, rank_3_of_4, by_expert, [4, 256, 128])
    second.down = sharded(second.down, rank_3_of_4, by_row, [8, 64, 128])
    model.head.weight = sharded(model.head.weight, rank_3_of_4["shards"], [Shard(0)], [128, 128])
    model.norm.weight = sharded(model.norm.weight, rank_3_of_4["shards"], [Shard(0)], [64])
    whole.init_weights(5)
    model.init_weights(5)
    assert torch.equal(first.up.to_local(), whole.blocks[0].ffn.experts.up[12:16])
    assert torch.equal(second.down.to_local(), whole.blocks[1].ffn.experts.down[8:16, 64:])
    assert torch.equal(model.head.weight.to_local(), whole.head.weight[129:])
    assert torch.equal(model.norm.weight.to_local(), torch.ones(64))


def test_wrapping_blocks_changes_nothing():
    plain = Dbrx({"size": "tiny"})
    wrapped = Dbrx({"size": "tiny"})
    wrapped.blocks[0] = checkpoint_wrapper(wrapped.blocks[0])
    wrapped.blocks[1] = torch.compile(wrapped.blocks[1], backend="eager")
    plain.init_weights(2)
    wrapped.init_weights(2)
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True)
    )


def test_scales():
    model = Dbrx({"size": "tiny"})
    model.init_weights(0)
    w = dict(model.named_parameters())
    for name, std in {
        "embed.weight": 0.02,
        "head.weight": 128**-0.5,
        "blocks.1.attention.qkv.weight": 128**-0.5,
        # 2 layers write 4 times into the residual stream.
        "blocks.1.attention.out.weight": 128**-0.5 / 2,
        "blocks.0.ffn.experts.up": 128**-0.5,
        "blocks.0.ffn.experts.down": 128**-0.5 / 2,
        "blocks.0.ffn.router.weight": 128**-0.5,
    }.items():
        assert w[name].std().item() == pytest.approx(std, rel=0.1), name
    assert all((w[name] == 1).all() for name in w if "norm" in name)


def test_biases_and_buffers_start_at_zero():
    ffn = {
        "ffn_type": "mb_dmoe",
        "moe_num_experts": 4,
        "moe_top_k": 1,
        "moe_bias_update_rate": 0.01,
    }
    with torch.device("meta"):
        model = Mpt({"size": "tiny", "ffn_config": ffn})
    model = model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(math.nan)
    model.init_weights(0)
    state = model.state_dict()
    assert all(t.isfinite().all() for t in state.values())
    zeros = [name for name in state if name.endswith(("bias", "selection_bias"))]
    assert {
        "blocks.0.ffn.bias",
        "blocks.0.attention.qkv.bias",
        "blocks.0.ffn.router.selection_bias",
    } <= set(zeros)
    assert not any(state[name].any() for name in zeros)
