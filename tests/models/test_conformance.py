"""Every family passes core's kit for models, tiny."""

from tokenyard.testing import ModelConformance
from tokenyard_models.families import FAMILIES

for _name, _path in FAMILIES.items():
    _class = "Test" + _path.rpartition(":")[2]
    _attributes = {"backend": _name, "config": {"size": "tiny", "vocab_size": 61}}
    globals()[_class] = type(_class, (ModelConformance,), _attributes)


class TestQwen3MoeWithADenseLayer(ModelConformance):
    backend = "qwen3_moe"
    config = {
        "size": "tiny",
        "hidden_size": 32,
        "vocab_size": 61,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [0],
    }


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


class TestMptWithRotaryPositions(ModelConformance):
    backend = "mpt_causal_lm"
    config = {
        "size": "tiny",
        "d_model": 32,
        "vocab_size": 61,
        "attn_config": {"rope": True, "clip_qkv": 1.0},
    }
