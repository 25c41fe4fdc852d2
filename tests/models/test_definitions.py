"""What the keys of a `model:` section mean, and the errors for wrong ones."""

import logging

import pytest
import torch

from tokenyard import ConfigError
from tokenyard_models import Dbrx, Llama, Mixtral, Mpt, ffn_config

dbrx = Dbrx.resolve
mixtral = Mixtral.resolve
mpt = Mpt.resolve

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


@pytest.mark.parametrize(
    ("ffn_type", "activation"),
    [("mb_dmoe", "gelu_tanh"), ("mb_moe", "gelu_tanh"), ("torch_dmoe", "gelu")],
)
def test_the_default_activation_is_that_of_llm_foundry(ffn_type, activation):
    assert mpt({"ffn_config": EXPERTS | {"ffn_type": ffn_type}}).moe.activation == activation


def test_the_default_activation_of_gated_experts_is_named(caplog):
    """MegaBlocks' default there, the tanh form, has no gated form here."""
    ffn_config._warn_of_exact_gelu.cache_clear()
    for _ in range(2):
        mpt({"ffn_config": EXPERTS | {"mlp_type": "glu"}})
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("model.ffn_config.ffn_act_fn is not set: gated experts have exact")


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
    assert (rule.capacity_factor, rule.jitter, rule.normalize, rule.score) == (
        1.5,
        0.1,
        1,
        "sigmoid",
    )
    assert (rule.bias_update_rate, rule.num_groups, rule.groups_kept, rule.scale) == (
        0.001,
        4,
        2,
        2.5,
    )
    assert (
        mpt({"ffn_config": EXPERTS | {"moe_capacity_factor": 1.5}}).moe.rule.capacity_factor is None
    )  # dropless


def test_dbrx_and_mixtral_full_and_tiny():
    full = dbrx({})
    tiny = dbrx({"size": "tiny", "n_layers": 3})
    assert (full.dim, full.clip_qkv, full.rope_theta, full.moe.rule.normalize) == (
        6144,
        8.0,
        500000.0,
        1,
    )
    assert (tiny.layers, tiny.dim, tiny.moe.num_experts, tiny.moe.top_k) == (3, 128, 16, 4)
    # A section keeps the keys that are not overridden.
    assert dbrx({"size": "tiny", "ffn_config": {"moe_top_k": 2}}).moe.ffn_dim == 128
    assert (mixtral({}).dim, mixtral({"size": "tiny"}).dim) == (4096, 128)
    assert mixtral({"max_seq_len": 77}).max_seq_len == 77


def test_the_published_dbrx_config_is_the_full_size():
    published = {
        "architectures": ["DbrxForCausalLM"],
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "model_type": "", "rope_theta": 500000},
        "d_model": 6144,
        "emb_pdrop": 0.0,
        "ffn_config": {
            "ffn_act_fn": {"name": "silu"},
            "ffn_hidden_size": 10752,
            "model_type": "",
            "moe_jitter_eps": 0,
            "moe_loss_weight": 0.05,
            "moe_num_experts": 16,
            "moe_top_k": 4,
        },
        "initializer_range": 0.02,
        "max_seq_len": 32768,
        "model_type": "dbrx",
        "n_heads": 48,
        "n_layers": 40,
        "output_router_logits": False,
        "resid_pdrop": 0.0,
        "router_aux_loss_coef": 0.05,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 100352,
    }
    assert dbrx(published) == dbrx({})


def test_the_published_mixtral_config_is_the_full_size():
    published = {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    }
    assert mixtral(published) == mixtral({})


def test_every_routing_option_trains():
    ffn = {
        "moe_score_function": "sigmoid",
        "moe_num_groups": 4,
        "moe_groups_kept": 2,
        "moe_group_score": "top2",
        "moe_bias_update_rate": 0.01,
        "moe_jitter_eps": 0.1,
        "moe_zloss_weight": 0.001,
        "ffn_type": "mb_moe",
        "moe_capacity_factor": 0.5,
        "shared_expert": True,
        "shared_expert_hidden_size": 24,
        "shared_expert_weighted_sum": True,
    }
    model = Dbrx({"size": "tiny", "d_model": 32, "ffn_config": ffn})
    output = model(torch.randint(0, 257, (2, 16)))
    (output.logits.square().mean() + model.auxiliary(output.balances, 32, 4)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.blocks[0].ffn.shared.down.shape == (32, 24)
    assert output.balances[0].dropped > 0
    model.blocks[0].ffn.router.update(output.balances[0].counts)
    assert model.blocks[0].ffn.router.selection_bias.abs().max().item() == pytest.approx(0.01)


def test_softmax_over_the_selected_is_another_rule():
    assert dbrx({"ffn_config": {"moe_select_first": True}}).moe.rule.select_first
    with pytest.raises(ConfigError, match="select_first goes with score 'softmax', not 'sigmoid'"):
        dbrx({"ffn_config": {"moe_select_first": True, "moe_score_function": "sigmoid"}})


def test_capacity_0_drops_nothing_as_in_megablocks():
    ffn = EXPERTS | {"ffn_type": "mb_moe", "moe_capacity_factor": 0}
    assert mpt({"ffn_config": ffn}).moe.rule.capacity_factor is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"backends": {"experts": "loop", "router": "auto"}},
            "backends.experts is 'loop', and the model has no",
        ),
        (
            {"expert_parallel": 2},
            "parallel.expert_parallel is 2, and the model has no experts; leave it out",
        ),
    ],
)
def test_a_dense_model_refuses_options_of_experts(options, sentence):
    with torch.device("meta"), pytest.raises(ConfigError, match=sentence):
        Llama({"size": "tiny"}, **options)


def test_some_layers_may_be_dense():
    model = Dbrx({"size": "tiny", "ffn_config": {"dense_layers": [0]}})
    output = model(torch.randint(0, 257, (1, 5)))
    assert len(output.balances) == 1
    assert not hasattr(model.blocks[0].ffn, "router")


@pytest.mark.parametrize(
    ("build", "config", "experts"),
    [
        (Mpt, {"ffn_config": EXPERTS | {"uniform_expert_assignment": True}}, 16),
        (Mixtral, {"uniform_expert_assignment": True}, 8),
    ],
)
def test_forced_balance_gives_every_expert_equal_slots(build, config, experts):
    model = build({"size": "tiny", **config})
    top_k = model.config.moe.top_k
    for balance in model(torch.randint(0, 257, (2, 8))).balances:
        assert balance.counts.tolist() == [16 * top_k // experts] * experts


def test_ignored_keys_are_named_in_one_warning(caplog):
    ffn = EXPERTS | {"mlp_impl": "grouped", "memory_optimized_mlp": True}
    with caplog.at_level(logging.WARNING, "tokenyard"):
        mpt({"init_device": "mixed", "ffn_config": ffn, "attn_config": {"attn_impl": "flash"}})
    (message,) = caplog.messages
    assert message == (
        "these keys mean nothing here and are ignored: model.init_device, "
        "model.ffn_config.mlp_impl, model.ffn_config.memory_optimized_mlp, "
        "model.attn_config.attn_impl"
    )


@pytest.mark.parametrize(
    ("build", "config", "sentence"),
    [
        (
            mpt,
            {"ffn_confg": {}},
            r"model.ffn_confg is not a known key \(did you mean 'ffn_config'\?\)",
        ),
        (
            mpt,
            {"ffn_config": {"moe_topk": 1}},
            r"model.ffn_config.moe_topk is not .*\(did you mean 'moe_top_k'\?\)",
        ),
        (
            mpt,
            {"ffn_config": EXPERTS | {"moe_top_k": 17}},
            "model.ffn_config.moe_top_k is 17 but moe_num_experts is 16; choose from 1 to 16",
        ),
        (
            mpt,
            {"n_heads": 7},
            "model.n_heads is 7, which does not divide d_model 2048; these do: 1, 2, 4",
        ),
        (mpt, {"d_model": "wide"}, "model.d_model is 'wide'; give a whole number"),
        (mpt, {"n_layers": 0}, "model.n_layers is 0; give a number at least 1"),
        (
            mpt,
            {"expansion_ratio": 1.0001},
            r"model.expansion_ratio: d_model 2048 \* expansion_ratio 1.0001 is .*whole",
        ),
        (
            mpt,
            {"attn_config": {"alibi": True}},
            "model.attn_config.alibi is True: ALiBi is not supported",
        ),
        (
            mpt,
            {"resid_pdrop": 0.1},
            "model.resid_pdrop is 0.1: dropout is not supported; say 0, where the",
        ),
        (
            mpt,
            {"learned_pos_emb": False},
            "learned_pos_emb and model.attn_config.rope are both false",
        ),
        (
            mpt,
            {"attn_config": {"kv_n_heads": 4}},
            "kv_n_heads is 4, but multihead_attention has 16",
        ),
        (mpt, {"attn_config": {"attn_type": "grouped_query_attention"}}, "kv_n_heads is missing"),
        (
            mpt,
            {"ffn_config": EXPERTS | {"mlp_type": "glu", "ffn_act_fn": {"name": "gelu_tanh"}}},
            "has no gated form",
        ),
        (
            mpt,
            {"ffn_config": EXPERTS | {"moe_jitter_eps": 2}},
            "model.ffn_config.moe_jitter_eps is 2; give a number below 1",
        ),
        (
            mpt,
            {
                "ffn_config": EXPERTS
                | {"mlp_type": "glu", "ffn_act_fn": {"name": "gelu", "approximate": "tanh"}}
            },
            "ffn_act_fn is 'gelu' with approximate 'tanh', which has no gated form; "
            "these have: silu, gelu, relu",
        ),
        (
            mpt,
            {"ffn_config": {"moe_num_experts": 16}},
            "moe_num_experts is for experts, but ffn_type is 'mptmlp'; set ffn_type: mb_dmoe",
        ),
        (
            mpt,
            {"ffn_config": EXPERTS | {"shared_expert_hidden_size": 64}},
            "shared_expert_hidden_size is given, but shared_expert is false; "
            "set shared_expert: true",
        ),
        (
            mpt,
            {"attn_config": {"rope": True, "rope_hf_config": {"type": "linear", "factor": 2.0}}},
            "rope_hf_config.type is 'linear': scaling of rotary positions is not supported",
        ),
        (
            mpt,
            {"ffn_config": EXPERTS | {"moe_num_groups": 3}},
            "router num_groups is 3, which does not divide .* 16",
        ),
        (
            dbrx,
            {"attn_config": {"kv_n_heads": 7}},
            "model.attn_config.kv_n_heads is 7, which does not divide n_heads 48; "
            "these do: 1, 2, 3",
        ),
        (
            dbrx,
            {"ffn_config": {"ffn_type": "mptmlp"}},
            "model.ffn_config.ffn_type is 'mptmlp'; give 'mb_dmoe', 'mb_moe' or",
        ),
        (
            dbrx,
            {"ffn_config": {"dense_layers": [40]}},
            "dense_layers names layer 40; there are layers 0 to 39",
        ),
        (dbrx, {"size": "huge"}, "model.size is 'huge'; give 'full' or 'tiny'"),
        (
            mixtral,
            {"sliding_window": 4096},
            "model.sliding_window is 4096, and there are 32768 positions;",
        ),
        (
            mixtral,
            {"num_attention_heads": 7},
            "num_attention_heads is 7, which does not divide hidden_size 4096",
        ),
        (
            mixtral,
            {"num_key_value_heads": 5},
            "num_key_value_heads is 5, which does not divide num_attention_heads 32",
        ),
        (
            mixtral,
            {"num_experts_per_tok": 9},
            "model.num_experts_per_tok is 9 but num_local_experts is 8",
        ),
        (mixtral, {"head_dim": 5}, "a head is 5 wide; rotary positions need an even width"),
    ],
)
def test_wrong_keys_and_values(build, config, sentence):
    model = {mpt: Mpt, dbrx: Dbrx, mixtral: Mixtral}[build]
    with torch.device("meta"), pytest.raises(ConfigError, match=sentence):
        model(config)


def test_the_degree_of_expert_parallelism_is_known_before_the_model_is_built():
    ffn = EXPERTS | {"moe_world_size": 4}
    assert Mpt.resolve({"ffn_config": ffn}).expert_parallel == 4
    assert Mpt.resolve({"ffn_config": EXPERTS | {"moe_world_size": None}}).expert_parallel is None
    assert Mpt({"size": "tiny", "ffn_config": EXPERTS}, expert_parallel=1).expert_parallel == 1
    assert Dbrx({"size": "tiny"}).expert_parallel == 1


def test_contradicting_degrees_of_expert_parallelism():
    with pytest.raises(
        ConfigError,
        match=r"moe_world_size is 1 and parallel.expert_parallel is 2; they mean the same",
    ):
        Mpt({"size": "tiny", "ffn_config": EXPERTS}, expert_parallel=2)
