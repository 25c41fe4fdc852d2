"""Qwen3-MoE (Qwen team 2025, arXiv 2505.09388): many small experts; queries and keys are normalised by head.

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


class Qwen3MoeConfig(PublishedMoE):
    """Its sizes: 30B-A3B's (`size: full`, 30.5 B parameters) or a tiny model's, and what is given besides."""

    ignored: ClassVar[frozenset[str]] = PublishedMoE.ignored | {"max_window_layers"}

    vocab_size: int = Field(151936, ge=1)
    hidden_size: int = Field(2048, ge=1)
    intermediate_size: int = Field(6144, ge=1)  # of layers without experts
    moe_intermediate_size: int = Field(768, ge=1)
    num_hidden_layers: int = Field(48, ge=1)
    num_attention_heads: int = Field(32, ge=1)
    num_key_value_heads: int = Field(4, ge=1)
    head_dim: int | None = Field(128, ge=1)
    max_position_embeddings: int = Field(40960, ge=1)
    rms_norm_eps: float = Field(1e-6, gt=0)
    rope_theta: float = Field(1e6, gt=0)
    attention_bias: Annotated[bool, only(False, "a bias in attention")] = False
    use_sliding_window: Annotated[bool, only(False, "sliding-window attention")] = False
    sliding_window: int | None = None  # means something only with use_sliding_window
    num_experts: int = Field(128, ge=1)
    num_experts_per_tok: int = Field(8, ge=1)
    norm_topk_prob: bool = True
    decoder_sparse_step: int = Field(1, ge=1)  # every so many layers there are experts
    mlp_only_layers: list[int] = []  # layers without experts
    router_aux_loss_coef: float = Field(0.001, ge=0)


TINY: dict[str, Any] = {
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


def resolve(config: Mapping[str, Any]) -> TransformerConfig:
    """Read the keys of a `model:` section; raises ConfigError."""
    read = parse(
        Qwen3MoeConfig, TINY | dict(config) if config.get("size") == "tiny" else config, "model"
    )
    heads = read.num_attention_heads
    if read.head_dim is None:
        check_divides("model.num_attention_heads", heads, "hidden_size", read.hidden_size)
    check_divides(
        "model.num_key_value_heads", read.num_key_value_heads, "num_attention_heads", heads
    )
    check_top_k(
        "model.num_experts_per_tok", read.num_experts_per_tok, "num_experts", read.num_experts
    )
    layers = range(read.num_hidden_layers)
    dense = {i for i in layers if (i + 1) % read.decoder_sparse_step} | set(read.mlp_only_layers)
    rule = RoutingRule(normalize=1 if read.norm_topk_prob else None)
    return TransformerConfig(
        vocab_size=read.vocab_size,
        max_seq_len=read.length,
        dim=read.hidden_size,
        layers=read.num_hidden_layers,
        heads=heads,
        kv_heads=read.num_key_value_heads,
        head_dim=read.head_dim or read.hidden_size // heads,
        moe=MoEConfig(
            read.moe_intermediate_size, read.num_experts, read.num_experts_per_tok, rule=rule
        ),
        dense_layers=frozenset(dense),
        dense_ffn_dim=read.intermediate_size,
        norm_eps=read.rms_norm_eps,
        rope_theta=read.theta,
        rope_scaling=read.scaling,
        qk_norm="head",
        tied_head=read.tie_word_embeddings,
        auxiliary=read.auxiliary(),
        expert_parallel=read.moe_world_size,
    )


class Qwen3Moe(Transformer):
    """Qwen3-MoE. The chosen weights sum to one, unless `norm_topk_prob` is false.

    `config` is a `model:` section; the other arguments are Transformer's.
    """

    definition = "qwen3_moe"
    schema: ClassVar[type[Strict]] = Qwen3MoeConfig
    resolve = staticmethod(resolve)

    def __init__(self, config: Mapping[str, Any], **placement: Any):
        super().__init__(resolve(config), **placement)
