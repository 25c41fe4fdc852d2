"""OLMoE (Muennighoff et al. 2024, arXiv 2409.02060): 64 experts of which each token takes 8; all queries normalised.

Keys are those of its published config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from tokenyard import RoutingRule
from tokenyard_models.config import MoEConfig, TransformerConfig, check_divides, check_top_k
from tokenyard_models.families._hf_keys import PublishedMoE
from tokenyard_models.schema import Strict, only, parse
from tokenyard_models.transformer import Transformer


class OlmoeConfig(PublishedMoE):
    """Its sizes: 1B-7B's (`size: full`, 6.9 B parameters) or a tiny model's, and what is given besides."""

    vocab_size: int = Field(50304, ge=1)
    hidden_size: int = Field(2048, ge=1)
    intermediate_size: int = Field(1024, ge=1)
    num_hidden_layers: int = Field(16, ge=1)
    num_attention_heads: int = Field(16, ge=1)
    num_key_value_heads: int | None = Field(None, ge=1)  # as many as num_attention_heads
    rms_norm_eps: float = Field(1e-5, gt=0)
    clip_qkv: float | None = Field(None, gt=0)
    attention_bias: Annotated[bool, only(False, "a bias in attention")] = False
    num_experts: int = Field(64, ge=1)
    num_experts_per_tok: int = Field(8, ge=1)
    norm_topk_prob: bool = False


TINY: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "num_experts": 16,
    "num_experts_per_tok": 4,
}


def resolve(config: Mapping[str, Any]) -> TransformerConfig:
    """Read the keys of a `model:` section; raises ConfigError."""
    read = parse(
        OlmoeConfig, TINY | dict(config) if config.get("size") == "tiny" else config, "model"
    )
    heads = read.num_attention_heads
    check_divides("model.num_attention_heads", heads, "hidden_size", read.hidden_size)
    kv_heads = read.num_key_value_heads or heads
    check_divides("model.num_key_value_heads", kv_heads, "num_attention_heads", heads)
    check_top_k(
        "model.num_experts_per_tok", read.num_experts_per_tok, "num_experts", read.num_experts
    )
    rule = RoutingRule(normalize=1 if read.norm_topk_prob else None)
    return TransformerConfig(
        vocab_size=read.vocab_size,
        max_seq_len=read.length,
        dim=read.hidden_size,
        layers=read.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=read.hidden_size // heads,
        moe=MoEConfig(
            read.intermediate_size, read.num_experts, read.num_experts_per_tok, rule=rule
        ),
        norm_eps=read.rms_norm_eps,
        rope_theta=read.theta,
        rope_scaling=read.scaling,
        qk_norm="all",
        clip_qkv=read.clip_qkv,
        tied_head=read.tie_word_embeddings,
        auxiliary=read.auxiliary(),
        expert_parallel=read.moe_world_size,
    )


class Olmoe(Transformer):
    """OLMoE. The chosen weights are the softmax's own, and sum to less than one.

    `config` is a `model:` section; the other arguments are Transformer's.
    """

    definition = "olmoe"
    schema: ClassVar[type[Strict]] = OlmoeConfig
    resolve = staticmethod(resolve)

    def __init__(self, config: Mapping[str, Any], **placement: Any):
        super().__init__(resolve(config), **placement)
