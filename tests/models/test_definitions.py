"""What the keys of a `model:` section mean, and how a wrong one is answered."""

import logging

import pytest
import torch

from tokenyard import ConfigError
from tokenyard_models import Dbrx, Mixtral, Mpt
from tokenyard_models.dbrx import resolve as dbrx
from tokenyard_models.mixtral import resolve as mixtral
from tokenyard_models.mpt import resolve as mpt

EXPERTS = {"ffn_type": "mb_dmoe", "moe_num_experts": 16, "moe_top_k": 4, "moe_world_size": 1}


def test_the_megablocks_announcement_s_snippet():
    config = mpt({"ffn_config": EXPERTS})
    assert (config.moe.num_experts, config.moe.top_k, config.expert_parallel) == (16, 4, 1)
    assert config.moe.activation == "gelu_tanh"  # MegaBlocks' default
    assert config.moe.ffn_dim == 4 * 2048
    assert config.moe.output_bias
    assert (config.auxiliary.balance_weight, config.auxiliary.convention) == (0.1, "megablocks")
    assert config.rope_theta is None
    assert config.tied_head


@pytest.mark.parametrize(
    ("ffn", "activation"),
    [
        ({"mlp_type": "glu"}, "geglu"),
        ({"mlp_type": "glu", "ffn_act_fn": {"name": "silu"}}, "swiglu"),
        ({"mlp_type": "glu", "ffn_act_fn": {"name": "relu"}}, "reglu"),
        ({"ffn_act_fn": {"name": "gelu"}}, "gelu"),
        ({"ffn_act_fn": {"name": "gelu", "approximate": "tanh"}}, "gelu_tanh"),
        ({"ffn_act_fn": {"name": "relu_squared"}}, "relu_squared"),
    ],
)
def test_activations(ffn, activation):
    assert mpt({"ffn_config": EXPERTS | ffn}).moe.activation == activation


def test_dense_mpt():
    config = mpt({"ffn_config": {"ffn_type": "mptglu", "ffn_hidden_size": 100}})
    assert config.moe is None
    assert (config.dense_ffn_dim, config.dense_activation, config.bias) == (100, "geglu", True)
    assert mpt({}).dense_activation == "gelu"


def test_routing_keys_reach_the_rule():
    ffn = EXPERTS | {
        "ffn_type": "mb_moe",
        "moe_capacity_factor": 1.5,
        "moe_jitter_eps": 0.1,
        "moe_normalize_expert_weights": 1,
        "moe_score_function": "sigmoid",
        "moe_bias_update_rate": 0.001,
        "moe_num_groups": 4,
        "moe_groups_kept": 2,
        "moe_weight_scale": 2.5,
    }
    rule = mpt({"ffn_config": ffn}).moe.rule
    assert (rule.capacity_factor, rule.jitter, rule.normalize, rule.score) == (1.5, 0.1, 1, "sigmoid")
    assert (rule.bias_update_rate, rule.num_groups, rule.groups_kept, rule.scale) == (0.001, 4, 2, 2.5)
    assert mpt({"ffn_config": EXPERTS | {"moe_capacity_factor": 1.5}}).moe.rule.capacity_factor is None  # dropless


def test_dbrx_and_mixtral_full_and_tiny():
    full, tiny = dbrx({}), dbrx({"size": "tiny", "n_layers": 3})
    assert (full.dim, full.clip_qkv, full.rope_theta, full.moe.rule.normalize) == (6144, 8.0, 500000.0, 1)
    assert (tiny.layers, tiny.dim, tiny.moe.num_experts, tiny.moe.top_k) == (3, 128, 16, 4)
    assert dbrx({"size": "tiny", "ffn_config": {"moe_top_k": 2}}).moe.ffn_dim == 128  # the section keeps the rest
    assert (mixtral({}).dim, mixtral({"size": "tiny"}).dim) == (4096, 128)
    assert mixtral({"max_seq_len": 77}).max_seq_len == 77


def test_some_layers_may_be_dense():
    model = Dbrx({"size": "tiny", "ffn_config": {"dense_layers": [0]}})
    output = model(torch.randint(0, 257, (1, 5)))
    assert len(output.balances) == 1


def test_forced_balance_gives_every_expert_its_turn():
    model = Mpt({"size": "tiny", "ffn_config": EXPERTS | {"uniform_expert_assignment": True}})
    for balance in model(torch.randint(0, 257, (2, 8))).balances:
        assert balance.counts.tolist() == [4] * 16


def test_keys_that_mean_nothing_here_are_named_in_one_warning(caplog):
    ffn = EXPERTS | {"mlp_impl": "grouped", "memory_optimized_mlp": True}
    with caplog.at_level(logging.WARNING, "tokenyard"):
        mpt({"init_device": "mixed", "ffn_config": ffn, "attn_config": {"attn_impl": "flash"}})
    (message,) = caplog.messages
    assert message == (
        "these keys mean nothing here and are ignored: model.init_device, model.ffn_config.mlp_impl, "
        "model.ffn_config.memory_optimized_mlp, model.attn_config.attn_impl"
    )


@pytest.mark.parametrize(
    ("build", "config", "sentence"),
    [
        (mpt, {"ffn_confg": {}}, r"model.ffn_confg is not a known key \(did you mean 'ffn_config'\?\)"),
        (mpt, {"ffn_config": {"moe_topk": 1}}, r"model.ffn_config.moe_topk is not .*\(did you mean 'moe_top_k'\?\)"),
        (
            mpt,
            {"ffn_config": EXPERTS | {"moe_top_k": 17}},
            "top_k is 17 but num_experts is 16; choose top_k from 1 to 16",
        ),
        (mpt, {"n_heads": 7}, "model: 7 heads do not divide the model width, 2048; these do: 1, 2, 4"),
        (mpt, {"d_model": "wide"}, "model.d_model is 'wide': input should be a valid integer"),
        (mpt, {"n_layers": 0}, "model.n_layers is 0: input should be greater than or equal to 1"),
        (mpt, {"expansion_ratio": 1.0001}, r"model.expansion_ratio: d_model 2048 \* expansion_ratio 1.0001 is .*whole"),
        (mpt, {"attn_config": {"alibi": True}}, "model.attn_config.alibi is True: ALiBi is not supported"),
        (mpt, {"resid_pdrop": 0.1}, "model.resid_pdrop is 0.1: dropout is not supported; leave the key out, or say 0"),
        (mpt, {"learned_pos_emb": False}, "learned_pos_emb and model.attn_config.rope are both false"),
        (mpt, {"attn_config": {"kv_n_heads": 4}}, "kv_n_heads is 4, but multihead_attention has 16"),
        (mpt, {"attn_config": {"attn_type": "grouped_query_attention"}}, "kv_n_heads is missing"),
        (mpt, {"ffn_config": EXPERTS | {"mlp_type": "glu", "ffn_act_fn": {"name": "gelu_tanh"}}}, "has no gated form"),
        (mpt, {"ffn_config": EXPERTS | {"moe_jitter_eps": 2}}, "router jitter is 2.0; it must be"),
        (dbrx, {"attn_config": {"kv_n_heads": 7}}, "7 key-value heads do not divide heads, 48; these do: 1, 2, 3"),
        (
            dbrx,
            {"ffn_config": {"ffn_type": "mptmlp"}},
            "model.ffn_config.ffn_type is 'mptmlp': input should be 'mb_dmoe'",
        ),
        (dbrx, {"ffn_config": {"dense_layers": [40]}}, "dense_layers names layer 40; there are layers 0 to 39"),
        (dbrx, {"size": "huge"}, "model.size is 'huge': input should be 'full' or 'tiny'"),
        (mixtral, {"sliding_window": 4096}, "model.sliding_window is 4096: sliding-window attention is not supported"),
        (mixtral, {"head_dim": 5}, "a head is 5 wide; rotary positions need an even width"),
    ],
)
def test_wrong_keys_and_values(build, config, sentence):
    model = {mpt: Mpt, dbrx: Dbrx, mixtral: Mixtral}[build]
    with torch.device("meta"), pytest.raises(ConfigError, match=sentence):
        model(config)


def test_contradicting_degrees_of_expert_parallelism():
    with pytest.raises(ConfigError, match=r"moe_world_size is 1 and parallel.expert_parallel is 2; they mean the same"):
        Mpt({"size": "tiny", "ffn_config": EXPERTS}, expert_parallel=2)
