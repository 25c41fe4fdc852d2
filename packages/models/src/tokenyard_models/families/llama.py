"""Llama (Touvron et al. 2023, arXiv 2307.09288), a dense model; Mistral's 7B (arXiv 2310.06825) is one, too.

Keys are those of its published config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from tokenyard_models.config import TransformerConfig, check_divides
from tokenyard_models.families._hf_keys import Published, check_window
from tokenyard_models.schema import Strict, only, parse
from tokenyard_models.transformer import Transformer


class LlamaConfig(Published):
    """Its sizes: Llama 2's 7B (`size: full`, 6.7 B parameters) or a tiny model's, and what is given besides."""

    ignored: ClassVar[frozenset[str]] = Published.ignored | {
        "is_llama_config",
        "max_sequence_length",
        "pretraining_tp",
    }

    vocab_size: int = Field(32000, ge=1)
    hidden_size: int = Field(4096, ge=1)
    intermediate_size: int = Field(11008, ge=1)
    num_hidden_layers: int = Field(32, ge=1)
    num_attention_heads: int = Field(32, ge=1)
    num_key_value_heads: int | None = Field(None, ge=1)  # as many as num_attention_heads
    head_dim: int | None = Field(None, ge=1)
    rms_norm_eps: float = Field(1e-5, gt=0)
    attention_bias: Annotated[bool, only(False, "a bias in attention")] = False
    mlp_bias: Annotated[bool, only(False, "a bias in the feed-forward layers")] = False
    sliding_window: int | None = Field(
        None, ge=1
    )  # of no less than there are positions, so that it is none


TINY: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def resolve(config: Mapping[str, Any]) -> TransformerConfig:
    """Read the keys of a `model:` section; raises ConfigError."""
    read = parse(
        LlamaConfig, TINY | dict(config) if config.get("size") == "tiny" else config, "model"
    )
    check_window(read.sliding_window, read.length)
    heads = read.num_attention_heads
    if read.head_dim is None:
        check_divides("model.num_attention_heads", heads, "hidden_size", read.hidden_size)
    kv_heads = read.num_key_value_heads or heads
    check_divides("model.num_key_value_heads", kv_heads, "num_attention_heads", heads)
    return TransformerConfig(
        vocab_size=read.vocab_size,
        max_seq_len=read.length,
        dim=read.hidden_size,
        layers=read.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=read.head_dim or read.hidden_size // heads,
        moe=None,
        dense_ffn_dim=read.intermediate_size,
        norm_eps=read.rms_norm_eps,
        rope_theta=read.theta,
        rope_scaling=read.scaling,
        tied_head=read.tie_word_embeddings,
    )


class Llama(Transformer):
    """Llama, without experts: the model that `upcycle` makes a Mixtral of.

    `config` is a `model:` section; the other arguments are Transformer's.
    """

    definition = "llama"
    schema: ClassVar[type[Strict]] = LlamaConfig
    resolve = staticmethod(resolve)

    def __init__(self, config: Mapping[str, Any], **placement: Any):
        super().__init__(resolve(config), **placement)
