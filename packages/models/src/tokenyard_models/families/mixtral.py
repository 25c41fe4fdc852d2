"""Mixtral (Jiang et al. 2024, arXiv 2401.04088): 8 experts of which each token takes 2, RMSNorm.

Keys are those of its published config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from tokenyard import RoutingRule
from tokenyard_models.config import MoEConfig, TransformerConfig, check_divides, check_top_k
from tokenyard_models.families._hf_keys import PublishedMoE, check_window
from tokenyard_models.schema import Strict, parse
from tokenyard_models.transformer import Transformer


class MixtralConfig(PublishedMoE):
    """Mixtral's sizes: 8x7B's (`size: full`, 46.7 B parameters) or a tiny model's, and what is given besides."""

    vocab_size: int = Field(32000, ge=1)
    hidden_size: int = Field(4096, ge=1)
    intermediate_size: int = Field(14336, ge=1)
    num_hidden_layers: int = Field(32, ge=1)
    num_attention_heads: int = Field(32, ge=1)
    num_key_value_heads: int = Field(8, ge=1)
    head_dim: int | None = Field(None, ge=1)
    max_position_embeddings: int = Field(32768, ge=1)
    rms_norm_eps: float = Field(1e-5, gt=0)
    rope_theta: float = Field(1e6, gt=0)
    sliding_window: int | None = Field(
        None, ge=1
    )  # of no less than there are positions, so that it is none
    num_local_experts: int = Field(8, ge=1)
    num_experts_per_tok: int = Field(2, ge=1)
    router_aux_loss_coef: float = Field(0.02, ge=0)
    router_jitter_noise: float = Field(0.0, ge=0, lt=1)


TINY: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
}


def resolve(config: Mapping[str, Any]) -> TransformerConfig:
    """Read the keys of a `model:` section; raises ConfigError."""
    read = parse(
        MixtralConfig, TINY | dict(config) if config.get("size") == "tiny" else config, "model"
    )
    check_window(read.sliding_window, read.length)
    heads = read.num_attention_heads
    if read.head_dim is None:
        check_divides("model.num_attention_heads", heads, "hidden_size", read.hidden_size)
    check_divides(
        "model.num_key_value_heads", read.num_key_value_heads, "num_attention_heads", heads
    )
    experts, top_k = read.num_local_experts, read.num_experts_per_tok
    check_top_k("model.num_experts_per_tok", top_k, "num_local_experts", experts)
    rule = RoutingRule(normalize=1, jitter=read.router_jitter_noise)
    return TransformerConfig(
        vocab_size=read.vocab_size,
        max_seq_len=read.length,
        dim=read.hidden_size,
        layers=read.num_hidden_layers,
        heads=heads,
        kv_heads=read.num_key_value_heads,
        head_dim=read.head_dim or read.hidden_size // heads,
        moe=MoEConfig(read.intermediate_size, experts, top_k, rule=rule),
        norm_eps=read.rms_norm_eps,
        rope_theta=read.theta,
        rope_scaling=read.scaling,
        tied_head=read.tie_word_embeddings,
        auxiliary=read.auxiliary(),
        expert_parallel=read.moe_world_size,
    )


class Mixtral(Transformer):
    """Mixtral. The two chosen weights sum to one; jitter reaches the router only.

    `config` is a `model:` section; the other arguments are Transformer's.
    """

    definition = "mixtral"
    schema: ClassVar[type[Strict]] = MixtralConfig
    resolve = staticmethod(resolve)

    def __init__(self, config: Mapping[str, Any], **placement: Any):
        super().__init__(resolve(config), **placement)
