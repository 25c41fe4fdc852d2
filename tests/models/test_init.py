"""Initial weights: the same in every layout, and of the size that trains."""

import math

import pytest
import torch

from tokenyard_models import Dbrx, Mpt, draw_rows


@pytest.mark.parametrize(
    "block",
    [
        (slice(0, 3),),
        (slice(3, 6),),
        (slice(1, 2), slice(4, 9)),
        (slice(None), slice(0, 5)),
        (slice(5, 6), slice(9, 10)),
    ],
)
def test_a_rank_draws_its_own_rows_of_packed_experts(block):
    whole = torch.empty(6, 10, 8)
    draw_rows(whole, 7, "up", 0.1)
    first = [s.start or 0 for s in block] + [0] * (3 - len(block))
    local = torch.full_like(whole[block], math.nan)
    draw_rows(local, 7, "up", 0.1, whole.shape, first)
    assert torch.equal(local, whole[block])


def test_seed_name_and_row_all_matter():
    draws = [torch.empty(2, 64) for _ in range(3)]
    for tensor, (seed, name) in zip(draws, [(1, "a"), (2, "a"), (1, "b")]):
        draw_rows(tensor, seed, name, 1.0)
    rows = [row for tensor in draws for row in tensor]
    assert all(not torch.equal(a, b) for i, a in enumerate(rows) for b in rows[:i])


def test_lower_precision_holds_the_same_numbers_rounded():
    full, half = torch.empty(4, 32), torch.empty(4, 32, dtype=torch.bfloat16)
    draw_rows(full, 3, "w", 1.0)
    draw_rows(half, 3, "w", 1.0)
    assert torch.equal(full.to(torch.bfloat16), half)


def test_scales():
    model = Dbrx({"size": "tiny"})
    model.init_weights(0)
    w = dict(model.named_parameters())
    for name, std in {
        "embed.weight": 0.02,
        "head.weight": 128**-0.5,
        "blocks.1.attention.qkv.weight": 128**-0.5,
        "blocks.1.attention.out.weight": 128**-0.5 / 2,  # 2 layers write 4 times into the residual stream
        "blocks.0.ffn.experts.up": 128**-0.5,
        "blocks.0.ffn.experts.down": 128**-0.5 / 2,
        "blocks.0.ffn.router.weight": 128**-0.5,
    }.items():
        assert w[name].std().item() == pytest.approx(std, rel=0.1), name
    assert all((w[name] == 1).all() for name in w if "norm" in name)


def test_biases_and_buffers_start_at_zero():
    ffn = {"ffn_type": "mb_dmoe", "moe_num_experts": 4, "moe_top_k": 1, "moe_bias_update_rate": 0.01}
    with torch.device("meta"):
        model = Mpt({"size": "tiny", "ffn_config": ffn})
    model = model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(math.nan)
    model.init_weights(0)
    state = model.state_dict()
    assert all(t.isfinite().all() for t in state.values())
    zeros = [name for name in state if name.endswith(("bias", "selection_bias"))]
    assert {"blocks.0.ffn.bias", "blocks.0.attention.qkv.bias", "blocks.0.ffn.router.selection_bias"} <= set(zeros)
    assert not any(state[name].any() for name in zeros)
