"""Mixtral (Jiang et al. 2024, arXiv 2401.04088): top-2 routing over 8 experts, RMSNorm.

The keys are those of the published config.json.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from tokenyard import RoutingRule
from tokenyard_models.config import TransformerConfig
from tokenyard_models.families._boxes import copy, per_expert
from tokenyard_models.families._config_json import experts, llama_keys, router_keys
from tokenyard_models.families._definition import Definition
from tokenyard_models.families._format import HfFormat, Row
from tokenyard_models.families._hf_keys import LlamaMoEKeys, check_window
from tokenyard_models.families._names import (
    DOWN,
    FUSED,
    FUSED_SUFFIX,
    HF_BLOCK,
    LLAMA,
    ROUTER,
    UP,
    names,
)


class MixtralConfig(LlamaMoEKeys):
    """Mixtral's keys. Defaults: 8x7B (`size: full`, 46.7 B parameters) or `size: tiny`."""

    vocab_size: int = Field(32000, ge=1)
    hidden_size: int = Field(4096, ge=1)
    intermediate_size: int = Field(14336, ge=1)
    num_hidden_layers: int = Field(32, ge=1)
    num_attention_heads: int = Field(32, ge=1)
    num_key_value_heads: int = Field(8, ge=1)
    head_dim: int | None = Field(None, ge=1)  # default: hidden_size / num_attention_heads
    max_position_embeddings: int = Field(32768, ge=1)
    rope_theta: float = Field(1e6, gt=0)
    sliding_window: int | None = Field(None, ge=1)  # at least the longest sequence: no effect
    num_local_experts: int = Field(8, ge=1)  # E
    num_experts_per_tok: int = Field(2, ge=1)
    router_aux_loss_coef: float = Field(0.02, ge=0)
    router_jitter_noise: float = Field(0.0, ge=0, lt=1)  # noise on the router's input in training

    def resolve(self) -> TransformerConfig:
        """Return the config of the transformer. Raises ConfigError."""
        check_window(self.sliding_window, self.length)
        rule = RoutingRule(normalize=1, jitter=self.router_jitter_noise)
        moe = self.experts(self.intermediate_size, "num_local_experts", rule)
        return self.transformer(self.head_dim, moe=moe)


class Mixtral(Definition):
    """Mixtral. The two routing weights of a token sum to one; jitter affects the router only."""

    definition = "mixtral"
    schema = MixtralConfig
    readme = (
        "Mixtral's published config.json",
        "`size: full` (8x7B: 46.7 B, 12.9 B active) or `tiny`",
    )
    tiny: ClassVar[dict[str, Any]] = {
        "vocab_size": 257,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
    }


MOE = HF_BLOCK + "block_sparse_moe."
WEIGHTS = (
    *LLAMA,
    Row(ROUTER, (MOE + "gate.weight",), copy),
    Row(UP, names(MOE + "experts.{expert}.", "w1.weight", "w3.weight"), per_expert),
    Row(DOWN, (MOE + "experts.{expert}.w2.weight",), per_expert),
)


def config_json(config: TransformerConfig) -> dict[str, Any]:
    """Return Mixtral's config.json. Raises ConfigError for a dense model."""
    moe = experts(config)
    return (
        llama_keys(config, "MixtralForCausalLM", "mixtral")
        | router_keys(config)
        | {
            "intermediate_size": moe.ffn_dim,
            "head_dim": config.head_dim,
            "num_local_experts": moe.num_experts,
            "router_jitter_noise": moe.rule.jitter,
            "sliding_window": None,
        }
    )


FORMATS = (
    HfFormat(
        Mixtral,
        "mixtral",
        WEIGHTS,
        config_json,
        defaults={"max_position_embeddings": 131072, "router_aux_loss_coef": 0.001},
        fused=FUSED,
        fused_suffix=FUSED_SUFFIX,
    ),
)
