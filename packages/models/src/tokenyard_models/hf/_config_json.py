"""A model of ours as its family's config.json."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from tokenyard import ConfigError
from tokenyard_models.config import MoEConfig, TransformerConfig


def llama(config: TransformerConfig) -> dict[str, Any]:
    """Return Llama's keys."""
    return _llama(config, "LlamaForCausalLM", "llama") | {
        "intermediate_size": config.dense_width,
        "head_dim": config.head_dim,
        "attention_bias": False,
        "mlp_bias": False,
    }


def qwen3(config: TransformerConfig) -> dict[str, Any]:
    """Return Qwen3's keys."""
    return _llama(config, "Qwen3ForCausalLM", "qwen3") | {
        "intermediate_size": config.dense_width,
        "head_dim": config.head_dim,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
    }


def mixtral(config: TransformerConfig) -> dict[str, Any]:
    """Return Mixtral's keys."""
    moe = _moe(config)
    return (
        _llama(config, "MixtralForCausalLM", "mixtral")
        | _routed(config, moe)
        | {
            "intermediate_size": moe.ffn_dim,
            "head_dim": config.head_dim,
            "num_local_experts": moe.num_experts,
            "router_jitter_noise": moe.rule.jitter,
            "sliding_window": None,
        }
    )


def qwen3_moe(config: TransformerConfig) -> dict[str, Any]:
    """Return Qwen3-MoE's keys."""
    moe = _moe(config)
    return (
        _llama(config, "Qwen3MoeForCausalLM", "qwen3_moe")
        | _routed(config, moe)
        | {
            "intermediate_size": config.dense_width,
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
    )


def olmoe(config: TransformerConfig) -> dict[str, Any]:
    """Return OLMoE's keys."""
    moe = _moe(config)
    return (
        _llama(config, "OlmoeForCausalLM", "olmoe")
        | _routed(config, moe)
        | {
            "intermediate_size": moe.ffn_dim,
            "num_experts": moe.num_experts,
            "norm_topk_prob": moe.rule.normalize is not None,
            "clip_qkv": config.clip_qkv,
            "attention_bias": False,
        }
    )


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
        "attn_config": {
            "kv_n_heads": config.kv_heads,
            "clip_qkv": config.clip_qkv,
            "rope_theta": config.rope_theta,
        },
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
        "rope_parameters": _rope(config),
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
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": _rope(config),
        "rope_theta": config.rope_theta,  # this and rope_scaling are for transformers before 5
        "tie_word_embeddings": config.tied_head,
        "vocab_size": config.vocab_size,
    } | ({"rope_scaling": _rope(config)} if config.rope_scaling else {})


def _rope(config: TransformerConfig) -> dict[str, Any]:
    if config.rope_scaling is None:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    return {"rope_type": "llama3", "rope_theta": config.rope_theta, **asdict(config.rope_scaling)}


def _routed(config: TransformerConfig, moe: MoEConfig) -> dict[str, Any]:
    return {
        "num_experts_per_tok": moe.top_k,
        "router_aux_loss_coef": config.auxiliary.balance_weight,
    }


def _moe(config: TransformerConfig) -> MoEConfig:
    if config.moe is None:
        raise ConfigError(
            "the model has no experts, and its family's folders are of models with experts"
        )
    return config.moe
