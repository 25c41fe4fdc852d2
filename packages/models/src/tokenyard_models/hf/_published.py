"""A model of ours as its family's config.json."""

from __future__ import annotations

from typing import Any

from tokenyard import ConfigError
from tokenyard_models.config import MoEConfig, TransformerConfig

DBRX_DEFAULTS: dict[str, Any] = {
    "attn_config": {"kv_n_heads": 1, "clip_qkv": None},
    "ffn_config": {"mlp_type": "glu", "moe_loss_weight": 0.01, "moe_normalize_expert_weights": 1.0},
}
"""What transformers takes for keys that a DBRX config.json leaves out, where that differs from the published sizes."""


def mixtral(config: TransformerConfig) -> dict[str, Any]:
    """Return Mixtral's keys."""
    moe = _moe(config)
    return _llama(config, "MixtralForCausalLM", "mixtral") | {
        "intermediate_size": moe.ffn_dim,
        "head_dim": config.head_dim,
        "num_local_experts": moe.num_experts,
        "router_jitter_noise": moe.rule.jitter,
        "sliding_window": None,
    }


def qwen3_moe(config: TransformerConfig) -> dict[str, Any]:
    """Return Qwen3-MoE's keys."""
    moe = _moe(config)
    return _llama(config, "Qwen3MoeForCausalLM", "qwen3_moe") | {
        "intermediate_size": config.dense_ffn_dim or 4 * config.dim,
        "moe_intermediate_size": moe.ffn_dim,
        "head_dim": config.head_dim,
        "num_experts": moe.num_experts,
        "norm_topk_prob": moe.rule.normalize is not None,
        "decoder_sparse_step": 1,
        "mlp_only_layers": sorted(config.dense_layers),
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
    }


def olmoe(config: TransformerConfig) -> dict[str, Any]:
    """Return OLMoE's keys."""
    moe = _moe(config)
    return _llama(config, "OlmoeForCausalLM", "olmoe") | {
        "intermediate_size": moe.ffn_dim,
        "num_experts": moe.num_experts,
        "norm_topk_prob": moe.rule.normalize is not None,
        "clip_qkv": config.clip_qkv,
        "attention_bias": False,
    }


def dbrx(config: TransformerConfig) -> dict[str, Any]:
    """Return DBRX's keys; the base of its rotations twice, since transformers reads only the second."""
    moe = _moe(config)
    return {
        "architectures": ["DbrxForCausalLM"],
        "model_type": "dbrx",
        "d_model": config.dim,
        "n_heads": config.heads,
        "n_layers": config.layers,
        "max_seq_len": config.max_seq_len,
        "vocab_size": config.vocab_size,
        "attn_config": {"kv_n_heads": config.kv_heads, "clip_qkv": config.clip_qkv, "rope_theta": config.rope_theta},
        "ffn_config": {
            "ffn_act_fn": {"name": "silu"},
            "ffn_hidden_size": moe.ffn_dim,
            "hidden_size": config.dim,
            "moe_num_experts": moe.num_experts,
            "moe_top_k": moe.top_k,
            "moe_jitter_eps": moe.rule.jitter or None,
            "moe_loss_weight": config.auxiliary.balance_weight,
            "moe_normalize_expert_weights": moe.rule.normalize,
        },
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "router_aux_loss_coef": config.auxiliary.balance_weight,
        "tie_word_embeddings": config.tied_head,
    }


def _llama(config: TransformerConfig, architecture: str, model_type: str) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "max_position_embeddings": config.max_seq_len,
        "num_attention_heads": config.heads,
        "num_experts_per_tok": _moe(config).top_k,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,  # for transformers before 5
        "router_aux_loss_coef": config.auxiliary.balance_weight,
        "tie_word_embeddings": config.tied_head,
        "vocab_size": config.vocab_size,
    }


def _moe(config: TransformerConfig) -> MoEConfig:
    if config.moe is None:
        raise ConfigError("the model has no experts; Hugging Face folders are written of models with experts")
    return config.moe
