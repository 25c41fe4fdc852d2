"""Qwen3's dense models (Qwen team 2025, arXiv 2505.09388): queries and keys are normalised by head.

Keys are those of its published config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tokenyard_models.config import TransformerConfig, check_divides
from tokenyard_models.families._hf_keys import Published
from tokenyard_models.schema import Strict, only, parse
from tokenyard_models.transformer import Transformer


class Qwen3Config(Published):
    """Its sizes: 8B's (`size: full`, 8.2 B parameters) or a tiny model's, and what is given besides."""

    ignored: ClassVar[frozenset[str]] = Published.ignored | {"max_window_layers"}

    vocab_size: int = Field(151936, ge=1)
    hidden_size: int = Field(4096, ge=1)
    intermediate_size: int = Field(12288, ge=1)
    num_hidden_layers: int = Field(36, ge=1)
    num_attention_heads: int = Field(32, ge=1)
    num_key_value_heads: int = Field(8, ge=1)
    head_dim: int = Field(128, ge=1)
    max_position_embeddings: int = Field(40960, ge=1)
    rms_norm_eps: float = Field(1e-6, gt=0)
    rope_theta: float = Field(1e6, gt=0)
    attention_bias: Annotated[bool, only(False, "a bias in attention")] = False
    use_sliding_window: Annotated[bool, only(False, "sliding-window attention")] = False
    sliding_window: int | None = None  # means something only with use_sliding_window
    layer_types: list[Literal["full_attention"]] | None = None


TINY: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
}


def resolve(config: Mapping[str, Any]) -> TransformerConfig:
    """Read the keys of a `model:` section; raises ConfigError."""
    read = parse(
        Qwen3Config, TINY | dict(config) if config.get("size") == "tiny" else config, "model"
    )
    heads, kv_heads = read.num_attention_heads, read.num_key_value_heads
    check_divides("model.num_key_value_heads", kv_heads, "num_attention_heads", heads)
    return TransformerConfig(
        vocab_size=read.vocab_size,
        max_seq_len=read.length,
        dim=read.hidden_size,
        layers=read.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=read.head_dim,
        moe=None,
        dense_ffn_dim=read.intermediate_size,
        norm_eps=read.rms_norm_eps,
        rope_theta=read.theta,
        rope_scaling=read.scaling,
        qk_norm="head",
        tied_head=read.tie_word_embeddings,
    )


class Qwen3(Transformer):
    """Qwen3, without experts: the model that `upcycle` makes a Qwen3-MoE of.

    `config` is a `model:` section; the other arguments are Transformer's.
    """

    definition = "qwen3"
    schema: ClassVar[type[Strict]] = Qwen3Config
    resolve = staticmethod(resolve)

    def __init__(self, config: Mapping[str, Any], **placement: Any):
        super().__init__(resolve(config), **placement)
