"""Small models that transformers makes and saves."""

import os
from copy import deepcopy

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

pytest.importorskip("transformers", minversion="5.14")

from transformers import (
    AutoModelForCausalLM,
    DbrxConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()

VOCABULARY = 67
LLAMA = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 96,
    "eos_token_id": 3,
    "pad_token_id": 0,
}


def mixtral(**changes):
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 5, "num_experts_per_tok": 2}
    return MixtralConfig(**LLAMA | sizes | changes)


def qwen3_moe(**changes):
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 28,
        "moe_intermediate_size": 10,
        "num_hidden_layers": 3,
    }
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 6}
    return Qwen3MoeConfig(
        **LLAMA | sizes | {"num_experts_per_tok": 3, "norm_topk_prob": True} | changes
    )


def olmoe(**changes):
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 10,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    sizes |= {"num_key_value_heads": 4, "num_experts": 6, "num_experts_per_tok": 3}
    return OlmoeConfig(**LLAMA | sizes | changes)


def dbrx(kv_n_heads=2, clip_qkv=0.02, theta=5000.0, **changes):
    """Set the base of the rotary positions twice: transformers reads one and needs the other."""
    attention = {"kv_n_heads": kv_n_heads, "clip_qkv": clip_qkv, "rope_theta": theta}
    experts = {
        "ffn_hidden_size": 24,
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "hidden_size": 24,
    } | changes.pop("ffn", {})
    sizes = {
        "d_model": 24,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 96,
        "vocab_size": VOCABULARY,
        "eos_token_id": 3,
    }
    rope = {"rope_type": "default", "rope_theta": theta}
    return DbrxConfig(
        **sizes, attn_config=attention, ffn_config=experts, rope_parameters=rope, **changes
    )


DENSE_SIZES = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def llama(**changes):
    return LlamaConfig(**LLAMA | DENSE_SIZES | changes)


def mistral(**changes):
    return MistralConfig(
        **LLAMA | DENSE_SIZES | {"num_key_value_heads": 2, "sliding_window": None} | changes
    )


def qwen3(**changes):
    return Qwen3Config(**LLAMA | DENSE_SIZES | {"num_key_value_heads": 2, "head_dim": 8} | changes)


STRETCHED = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
}
STRETCHED["original_max_position_embeddings"] = 24
DENSE = {
    "llama": llama(),
    "llama with stretched positions": llama(rope_parameters=STRETCHED),
    "llama of odd sizes, tied": llama(
        hidden_size=20, head_dim=6, intermediate_size=7, tie_word_embeddings=True
    ),
    "mistral": mistral(),
    "qwen3": qwen3(),
}
MODELS = DENSE | {
    "mixtral": mixtral(),
    "mixtral of odd sizes": mixtral(
        hidden_size=15, head_dim=6, intermediate_size=7, num_local_experts=3
    ),
    "mixtral of one head, tied": mixtral(
        num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=True
    ),
    "qwen3_moe": qwen3_moe(),
    "qwen3_moe with a dense layer": qwen3_moe(mlp_only_layers=[1], norm_topk_prob=False),
    "qwen3_moe with experts in every second": qwen3_moe(
        decoder_sparse_step=2, hidden_size=17, moe_intermediate_size=9
    ),
    "olmoe": olmoe(),
    "olmoe clipped": olmoe(clip_qkv=0.5, norm_topk_prob=True, num_key_value_heads=2),
    "dbrx": dbrx(),
    "dbrx of odd sizes": dbrx(
        kv_n_heads=1, clip_qkv=0.5, ffn={"ffn_hidden_size": 7, "moe_num_experts": 5}
    ),
}


def _runs(config):
    """Return whether transformers can run a DBRX of odd sizes.

    Version 5.14 confuses DBRX's width with that of its experts and does not transpose w1.
    """
    try:
        made(config)(torch.ones(1, 2, dtype=torch.long))
    except RuntimeError:
        return False
    return True


def made(config):
    """Return a model with weights so large that no two router scores are close."""
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(deepcopy(config), **eager(config))
    with torch.no_grad():
        for parameter in model.parameters():
            mean = 1 if parameter.dim() == 1 else 0  # 1 for norms
            parameter.copy_(torch.randn_like(parameter) * 0.3 + mean)
    return model


def eager(config):
    """Choose eager experts: torch's grouped matmul refuses odd widths.

    DBRX has no `experts_implementation`, and dense models have no experts.
    """
    return {} if config.model_type in ("dbrx", *DENSE) else {"experts_implementation": "eager"}


def loaded(folder, config):
    """Load a folder with transformers alone."""
    return AutoModelForCausalLM.from_pretrained(folder, **eager(config))


if not _runs(MODELS["dbrx of odd sizes"]):
    MODELS = {name: config for name, config in MODELS.items() if config.model_type != "dbrx"}
