"""Every definition passes core's kit for models, tiny."""

from tokenyard.testing import ModelConformance


class TestDbrx(ModelConformance):
    backend = "dbrx"
    config = {"size": "tiny", "d_model": 32, "vocab_size": 61, "ffn_config": {"ffn_hidden_size": 24}}


class TestMixtral(ModelConformance):
    backend = "mixtral"
    config = {"size": "tiny", "hidden_size": 32, "vocab_size": 61, "intermediate_size": 24}


class TestMptWithExperts(ModelConformance):
    backend = "mpt_causal_lm"
    config = {
        "size": "tiny",
        "d_model": 32,
        "vocab_size": 61,
        "ffn_config": {"ffn_type": "mb_dmoe", "moe_num_experts": 8, "moe_top_k": 2, "shared_expert": True},
    }


class TestMptDense(ModelConformance):
    backend = "mpt_causal_lm"
    config = {"size": "tiny", "d_model": 32, "vocab_size": 61, "attn_config": {"rope": True, "clip_qkv": 1.0}}
