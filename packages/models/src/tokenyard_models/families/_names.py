"""Tensor names that several families share, as rows of a weight table."""

from __future__ import annotations

from tokenyard_models.families._boxes import concat, concat_heads, copy, per_expert
from tokenyard_models.families._format import Row

BLOCK = "blocks.{layer}."
ROUTER = BLOCK + "ffn.router.weight"
UP = BLOCK + "ffn.experts.up"
DOWN = BLOCK + "ffn.experts.down"
HF_BLOCK = "model.layers.{layer}."


def names(prefix: str, *suffixes: str) -> tuple[str, ...]:
    """Return the names with a common prefix."""
    return tuple(prefix + suffix for suffix in suffixes)


LLAMA = (
    Row("embed.weight", ("model.embed_tokens.weight",), copy),
    Row(BLOCK + "norm_1.weight", (HF_BLOCK + "input_layernorm.weight",), copy),
    Row(
        BLOCK + "attention.qkv.weight",
        names(HF_BLOCK + "self_attn.", "q_proj.weight", "k_proj.weight", "v_proj.weight"),
        concat_heads,
    ),
    Row(BLOCK + "attention.q_norm.weight", (HF_BLOCK + "self_attn.q_norm.weight",), copy),
    Row(BLOCK + "attention.k_norm.weight", (HF_BLOCK + "self_attn.k_norm.weight",), copy),
    Row(BLOCK + "attention.out.weight", (HF_BLOCK + "self_attn.o_proj.weight",), copy),
    Row(BLOCK + "norm_2.weight", (HF_BLOCK + "post_attention_layernorm.weight",), copy),
    Row("norm.weight", ("model.norm.weight",), copy),
    Row("head.weight", ("lm_head.weight",), copy),
)
"""All but the feed-forward layers."""

DENSE = (
    *LLAMA,
    Row(BLOCK + "ffn.up", names(HF_BLOCK + "mlp.", "gate_proj.weight", "up_proj.weight"), concat),
    Row(BLOCK + "ffn.down", (HF_BLOCK + "mlp.down_proj.weight",), copy),
)
"""With dense feed-forward layers."""

EXPERTS = (
    *DENSE,
    Row(ROUTER, (HF_BLOCK + "mlp.gate.weight",), copy),
    Row(
        UP,
        names(HF_BLOCK + "mlp.experts.{expert}.", "gate_proj.weight", "up_proj.weight"),
        per_expert,
    ),
    Row(DOWN, (HF_BLOCK + "mlp.experts.{expert}.down_proj.weight",), per_expert),
)
"""With experts, as Qwen and OLMoE name them, in some or all layers."""

FUSED = (
    Row(ROUTER, (HF_BLOCK + "mlp.gate.weight",), copy),
    Row(UP, (HF_BLOCK + "mlp.experts.gate_up_proj",), copy),
    Row(DOWN, (HF_BLOCK + "mlp.experts.down_proj",), copy),
)
"""The experts as transformers 5 holds them in memory: one tensor for all."""

FUSED_SUFFIX = ".mlp.experts.gate_up_proj"
