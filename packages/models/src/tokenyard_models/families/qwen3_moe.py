"""Qwen3-MoE (Qwen team 2025, arXiv 2505.09388): many small experts.

RMSNorm of each query and key head. The keys are those of the published config.json.
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


class Qwen3MoeConfig(LlamaMoEKeys):
    """Qwen3-MoE's keys. Defaults: 30B-A3B (`size: full`, 30.5 B parameters) or `size: tiny`."""

    ignored: ClassVar[frozenset[str]] = LlamaMoEKeys.ignored | {"max_window_layers"}

    vocab_size: int = Field(151936, ge=1)
    hidden_size: int = Field(2048, ge=1)
    intermediate_size: int = Field(6144, ge=1)  # F of dense layers
    moe_intermediate_size: int = Field(768, ge=1)  # F of an expert
    num_hidden_layers: int = Field(48, ge=1)
    num_attention_heads: int = Field(32, ge=1)
    num_key_value_heads: int = Field(4, ge=1)
    head_dim: int | None = Field(128, ge=1)  # null: hidden_size / num_attention_heads
    max_position_embeddings: int = Field(40960, ge=1)
    rms_norm_eps: float = Field(1e-6, gt=0)
    rope_theta: float = Field(1e6, gt=0)
    attention_bias: Annotated[bool, only(False, "a bias in attention")] = False
    use_sliding_window: Annotated[bool, only(False, "sliding-window attention")] = False
    sliding_window: int | None = None  # unused without use_sliding_window
    num_experts: int = Field(128, ge=1)  # E
    num_experts_per_tok: int = Field(8, ge=1)
    norm_topk_prob: bool = True  # a token's routing weights sum to one
    decoder_sparse_step: int = Field(1, ge=1)  # every n-th layer has experts
    mlp_only_layers: list[int] = []  # numbers of dense layers, from 0
    router_aux_loss_coef: float = Field(0.001, ge=0)

    def resolve(self) -> TransformerConfig:
        """Return the config of the transformer. Raises ConfigError."""
        rule = RoutingRule(normalize=1 if self.norm_topk_prob else None)
        layers = range(self.num_hidden_layers)
        skipped = {i for i in layers if (i + 1) % self.decoder_sparse_step}
        return self.transformer(
            self.head_dim,
            moe=self.experts(self.moe_intermediate_size, "num_experts", rule),
            dense_layers=frozenset(skipped | set(self.mlp_only_layers)),
            dense_ffn_dim=self.intermediate_size,
            qk_norm="head",
        )


class Qwen3Moe(Definition):
    """Qwen3-MoE. A token's routing weights sum to one unless `norm_topk_prob` is false."""

    definition = "qwen3_moe"
    schema = Qwen3MoeConfig
    readme = (
        "Qwen3-MoE's published config.json",
        "`size: full` (30B-A3B: 30.5 B, 3.4 B active) or `tiny`",
    )
    tiny: ClassVar[dict[str, Any]] = {
        "vocab_size": 257,
        "hidden_size": 128,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "num_experts": 16,
        "num_experts_per_tok": 4,
    }


def config_json(config: TransformerConfig) -> dict[str, Any]:
    """Return Qwen3-MoE's config.json. Raises ConfigError for a dense model."""
    moe = experts(config)
    return (
        llama_keys(config, "Qwen3MoeForCausalLM", "qwen3_moe")
        | router_keys(config)
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


FORMATS = (
    HfFormat(
        Qwen3Moe,
        "qwen3_moe",
        EXPERTS,
        config_json,
        defaults={
            "num_hidden_layers": 24,
            "max_position_embeddings": 32768,
            "rope_theta": 10000.0,
            "norm_topk_prob": False,
        },
        fused=FUSED,
        fused_suffix=FUSED_SUFFIX,
        renamed={"num_local_experts": "num_experts"},  # since transformers 5.24
    ),
)
