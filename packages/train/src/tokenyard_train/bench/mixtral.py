"""Transformers' Mixtral with the sizes of a model of ours."""

from __future__ import annotations

from typing import Any

import torch

from tokenyard import ConfigError
from tokenyard_models import TransformerConfig, use_in_transformers

IMPLEMENTATIONS = {
    "transformers-eager": "eager",
    "transformers-grouped_mm": "grouped_mm",
    "transformers-tokenyard": "tokenyard",
}
"""Expert implementation of each peer. The last is ours, inside transformers."""


def mixtral(size: TransformerConfig, implementation: str, dtype: torch.dtype, device: str) -> Any:
    """Return a MixtralForCausalLM. Its weights are drawn on the device, in their dtype.

    `implementation` is a value of IMPLEMENTATIONS. Raises ConfigError if Mixtral has no such model.
    """
    try:
        from transformers import MixtralConfig, MixtralForCausalLM
    except ImportError:
        raise ConfigError('--peers needs transformers; pip install "transformers>=5.14"') from None
    if implementation == "tokenyard":
        use_in_transformers()
    with torch.device(device):
        return MixtralForCausalLM._from_config(
            MixtralConfig(**mixtral_keys(size)),
            attn_implementation="sdpa",
            experts_implementation=implementation,
            dtype=dtype,
        )


def mixtral_keys(size: TransformerConfig) -> dict[str, Any]:
    """Return the keys of a MixtralConfig. Raises ConfigError if Mixtral has no such model."""
    moe = size.moe
    if moe is None or moe.activation != "swiglu" or size.rope_theta is None or size.dense_layers:
        raise ConfigError(
            "--peers compares with Mixtral, "
            "which has swiglu experts in every layer and rotary positions"
        )
    if moe.forced_balance:
        raise ConfigError(
            "uniform_expert_assignment is True, and --peers always route by their router; "
            "set it to false, or give --peers none"
        )
    return {
        "vocab_size": size.vocab_size,
        "hidden_size": size.dim,
        "intermediate_size": moe.ffn_dim,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": size.max_seq_len,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "tie_word_embeddings": size.tied_head,
        "output_router_logits": True,
        # With balanced experts, transformers' loss is K and ours is 1.
        "router_aux_loss_coef": size.auxiliary.balance_weight / moe.top_k,
        "sliding_window": None,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
