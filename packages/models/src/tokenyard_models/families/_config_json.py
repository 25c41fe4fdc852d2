"""Write the config.json keys that several families share."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from tokenyard import ConfigError
from tokenyard_models.config import MoEConfig, TransformerConfig


def llama_keys(config: TransformerConfig, architecture: str, model_type: str) -> dict[str, Any]:
    """Return the keys of Llama and its relatives."""
    rope = rope_parameters(config)
    keys = {
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
        "rope_parameters": rope,
        # transformers before 5 reads rope_theta and rope_scaling instead.
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_head,
        "vocab_size": config.vocab_size,
    }
    return keys | ({"rope_scaling": rope} if config.rope_scaling else {})


def router_keys(config: TransformerConfig) -> dict[str, Any]:
    """Return the keys of the routers, as Mixtral, Qwen3-MoE and OLMoE name them."""
    return {
        "num_experts_per_tok": experts(config).top_k,
        "router_aux_loss_coef": config.auxiliary.balance_weight,
    }


def rope_parameters(config: TransformerConfig) -> dict[str, Any]:
    """Return transformers' section for rotary positions."""
    if config.rope_scaling is None:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    return {"rope_type": "llama3", "rope_theta": config.rope_theta, **asdict(config.rope_scaling)}


def experts(config: TransformerConfig) -> MoEConfig:
    """Return the config of the MoE layers. Raises ConfigError for a dense model."""
    if config.moe is None:
        raise ConfigError(
            "the model has no experts, and its family's folders are of models with experts"
        )
    return config.moe
