"""OLMoE (Muennighoff et al. 2024, arXiv 2409.02060): top-8 routing over 64 experts.

Queries and keys are normalised over all heads together. The keys are those of the published
config.json.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from tokenyard import RoutingRule
from tokenyard_models.config import TransformerConfig
from tokenyard_models.families._config_json import experts, llama_keys, router_keys
from tokenyard_models.families._definition import Definition
from tokenyard_models.families._format import HfFormat
from tokenyard_models.families._hf_keys import LlamaMoEKeys
from tokenyard_models.families._names import EXPERTS, FUSED, FUSED_SUFFIX
from tokenyard_models.strict_config import only


class OlmoeConfig(LlamaMoEKeys):
    """OLMoE's keys. Defaults: 1B-7B (`size: full`, 6.9 B parameters) or `size: tiny`."""

    vocab_size: int = Field(50304, ge=1)
    hidden_size: int = Field(2048, ge=1)
    intermediate_size: int = Field(1024, ge=1)
    num_hidden_layers: int = Field(16, ge=1)
    num_attention_heads: int = Field(16, ge=1)
    clip_qkv: float | None = Field(None, gt=0)  # clamp queries, keys and values to +-clip_qkv
    attention_bias: Annotated[bool, only(False, "a bias in attention")] = False
    num_experts: int = Field(64, ge=1)  # E
    num_experts_per_tok: int = Field(8, ge=1)
    norm_topk_prob: bool = False  # a token's routing weights sum to one

    def resolve(self) -> TransformerConfig:
        """Return the config of the transformer. Raises ConfigError."""
        rule = RoutingRule(normalize=1 if self.norm_topk_prob else None)
        moe = self.experts(self.intermediate_size, "num_experts", rule)
        return self.transformer(moe=moe, qk_norm="all", clip_qkv=self.clip_qkv)


class Olmoe(Definition):
    """OLMoE. A token's routing weights are softmax scores and sum to less than one."""

    definition = "olmoe"
    schema = OlmoeConfig
    readme = (
        "OLMoE's published config.json",
        "`size: full` (6.9 B, 1.3 B active) or `tiny`",
    )
    tiny: ClassVar[dict[str, Any]] = {
        "vocab_size": 257,
        "hidden_size": 128,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "num_experts": 16,
        "num_experts_per_tok": 4,
    }


def config_json(config: TransformerConfig) -> dict[str, Any]:
    """Return OLMoE's config.json. Raises ConfigError for a dense model."""
    moe = experts(config)
    return (
        llama_keys(config, "OlmoeForCausalLM", "olmoe")
        | router_keys(config)
        | {
            "intermediate_size": moe.ffn_dim,
            "num_experts": moe.num_experts,
            "norm_topk_prob": moe.rule.normalize is not None,
            "clip_qkv": config.clip_qkv,
            "attention_bias": False,
        }
    )


FORMATS = (
    HfFormat(
        Olmoe,
        "olmoe",
        EXPERTS,
        config_json,
        defaults={"intermediate_size": 2048},
        fused=FUSED,
        fused_suffix=FUSED_SUFFIX,
    ),
)
