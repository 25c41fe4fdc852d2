"""Every definition passes core's kit for models, tiny."""

from tokenyard.testing import ModelConformance


class TestDbrx(ModelConformance):
    backend = "dbrx"
    config = {
        "size": "tiny",
        "d_model": 32,
        "vocab_size": 61,
        "ffn_config": {"ffn_hidden_size": 24},
    }


class TestMixtral(ModelConformance):
    backend = "mixtral"
    config = {"size": "tiny", "hidden_size": 32, "vocab_size": 61, "intermediate_size": 24}


class TestLlama(ModelConformance):
    backend = "llama"
    config = {"size": "tiny", "hidden_size": 32, "vocab_size": 61, "intermediate_size": 24}


class TestQwen3(ModelConformance):
    backend = "qwen3"
    config = {
        "size": "tiny",
        "hidden_size": 32,
        "vocab_size": 61,
        "intermediate_size": 24,
        "head_dim": 8,
    }


class TestQwen3Moe(ModelConformance):
    backend = "qwen3_moe"
    config = {
        "size": "tiny",
        "hidden_size": 32,
        "vocab_size": 61,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [0],
    }


class TestOlmoe(ModelConformance):
    backend = "olmoe"
    config = {"size": "tiny", "hidden_size": 32, "vocab_size": 61, "intermediate_size": 24}


class TestMptWithExperts(ModelConformance):
    backend = "mpt_causal_lm"
    config = {
        "size": "tiny",
        "d_model": 32,
        "vocab_size": 61,
        "ffn_config": {
            "ffn_type": "mb_dmoe",
            "moe_num_experts": 8,
            "moe_top_k": 2,
            "shared_expert": True,
        },
    }


class TestMptDense(ModelConformance):
    backend = "mpt_causal_lm"
    config = {
        "size": "tiny",
        "d_model": 32,
        "vocab_size": 61,
        "attn_config": {"rope": True, "clip_qkv": 1.0},
    }
