"""Parameters and operations, counted from the published shapes."""

import pytest
import torch

from tokenyard import count_parameters
from tokenyard.count import training_flops_per_token
from tokenyard_models import Dbrx, Mixtral, Mpt

DBRX = (6144, 10752, 100352, 40, 16, 4)
MIXTRAL = (4096, 14336, 32000, 32, 8, 2)

ON_ANY = dict.fromkeys(("router", "permutation", "experts"), "torch")


def meta(cls, config):
    with torch.device("meta"):
        return cls(config)


def test_dbrx_is_131_6_and_36_5_billion():
    d, f, vocab, layers, e, k = DBRX
    attention = d * (d + 2 * 8 * 128) + d * d
    expert = 3 * d * f
    rest = layers * (attention + 2 * d + e * d) + 2 * vocab * d + d
    size = count_parameters(meta(Dbrx, {}))
    assert size.total == rest + layers * e * expert == 131_596_523_520
    assert size.active == rest + layers * k * expert == 36_469_708_800
    assert size.experts == layers * e * expert


def test_mixtral_is_46_7_and_12_9_billion():
    d, f, vocab, layers, e, k = MIXTRAL
    attention = d * (d + 2 * 8 * 128) + d * d
    rest = layers * (attention + 2 * d + e * d) + 2 * vocab * d + d
    size = count_parameters(meta(Mixtral, {}))
    assert size.total == rest + layers * e * 3 * d * f == 46_702_792_704
    assert size.active == rest + layers * k * 3 * d * f == 12_879_925_248


def test_flops_count_active_matrices_and_causal_attention():
    d, f, vocab, layers, e, k = DBRX
    s = 4096
    attention = d * (d + 2 * 8 * 128) + d * d
    matrices = layers * (attention + e * d + k * 3 * d * f) + vocab * d
    scores = layers * sum(2 * 2 * d * (position + 1) for position in range(s)) / s
    model = meta(Dbrx, {})
    assert model.flops_per_token(s) == 2 * matrices + scores


def test_frozen_weights_have_no_gradient_to_compute():
    d, f, vocab, layers, e, k = DBRX
    model = meta(Dbrx, {})
    forward = model.flops_per_token(64)
    assert training_flops_per_token(model, 64) == 3 * forward
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is model.blocks[0].ffn.experts.down)
    attention = d * (d + 2 * 8 * 128) + d * d
    frozen = layers * (attention + e * d + k * 3 * d * f) + vocab * d - k * d * f
    assert training_flops_per_token(model, 64) == 3 * forward - 2 * frozen


def test_a_tied_head_is_one_parameter_and_one_matmul():
    config = {
        "size": "tiny",
        "no_bias": True,
        "learned_pos_emb": False,
        "attn_config": {"rope": True},
    }
    tied, untied = (meta(Mpt, config | {"tie_word_embeddings": tie}) for tie in (True, False))
    assert count_parameters(untied).total - count_parameters(tied).total == 257 * 128
    assert untied.flops_per_token(64) == tied.flops_per_token(64)


def test_biases_and_learned_positions_are_not_matmuls():
    config = {
        "size": "tiny",
        "ffn_config": {"ffn_type": "mb_dmoe", "moe_num_experts": 4, "moe_top_k": 1},
    }
    with_bias, without = (meta(Mpt, config | {"no_bias": flag}) for flag in (False, True))
    assert count_parameters(with_bias).total > count_parameters(without).total
    assert with_bias.flops_per_token(64) == without.flops_per_token(64)


@pytest.mark.parametrize(("dtype", "width"), [(None, 4), (torch.bfloat16, 2)])
def test_a_norm_of_a_gpu_saves_its_input(dtype, width):
    """RMSNorm is one kernel of torch there, which saves no result in float32."""
    saved = []
    for device in ("cpu", "cuda:0"):
        with torch.device("meta"):
            model = Mixtral({"size": "tiny"}, device=device, dtype=dtype, backends=ON_ANY)
        saved.append(model.saved_bytes_per_token(16, 2))
    dim = model.config.dim
    on_cpu, on_gpu = saved
    less = (2 * 4 - width) * dim
    assert on_cpu.rest - on_gpu.rest == less
    assert [a - b for a, b in zip(on_cpu.blocks, on_gpu.blocks)] == [2 * less] * len(model.blocks)
    assert on_gpu.block_input == on_cpu.block_input == width * dim
