"""What transformers takes for keys that a config.json leaves out, where that differs from the sizes of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "mixtral": {"max_position_embeddings": 131072, "router_aux_loss_coef": 0.001},
    "qwen3_moe": {
        "num_hidden_layers": 24,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "norm_topk_prob": False,
    },
    "olmoe": {"intermediate_size": 2048},
    "dbrx": {
        "d_model": 2048,
        "n_heads": 16,
        "n_layers": 24,
        "max_seq_len": 2048,
        "vocab_size": 32000,
        "attn_config": {"kv_n_heads": 1, "clip_qkv": None},
        "ffn_config": {
            "ffn_hidden_size": 3584,
            "mlp_type": "glu",
            "moe_num_experts": 4,
            "moe_top_k": 1,
            "moe_loss_weight": 0.01,
            "moe_normalize_expert_weights": 1.0,
        },
    },
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    "mistral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
    },
    "qwen3": {
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
    },
}
"""By `model_type`."""
