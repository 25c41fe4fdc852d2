"""DBRX (Databricks 2024): 16 experts of which each token takes 4, clipped attention, LayerNorm without bias.

Keys are those of its published config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tokenyard_models.config import TransformerConfig, check_divides
from tokenyard_models.families._hf_keys import RopeParameters
from tokenyard_models.ffn import ActivationName, FfnConfig, merged
from tokenyard_models.schema import HOUSEKEEPING, Strict, only, parse
from tokenyard_models.transformer import Transformer


class DbrxAttention(Strict):
    """Grouped-query attention."""

    ignored: ClassVar[frozenset[str]] = HOUSEKEEPING | {"attn_impl"}

    kv_n_heads: int = Field(8, ge=1)
    clip_qkv: float | None = Field(8.0, gt=0)
    rope_theta: float | None = Field(None, gt=0)  # 500,000, unless rope_parameters say otherwise
    attn_pdrop: Annotated[float, only(0, "dropout")] = 0.0


class DbrxFfn(FfnConfig):
    """DBRX's experts."""

    ignored: ClassVar[frozenset[str]] = FfnConfig.ignored | HOUSEKEEPING | {"hidden_size"}

    ffn_type: Literal["mb_dmoe", "mb_moe", "torch_dmoe"] = "mb_dmoe"
    ffn_hidden_size: int = Field(10752, ge=1)
    ffn_act_fn: ActivationName = ActivationName(name="silu")
    mlp_type: Literal["mlp", "glu"] = "glu"
    moe_num_experts: int = Field(16, ge=1)
    moe_top_k: int = Field(4, ge=1)
    moe_loss_weight: float = Field(0.05, ge=0)
    moe_normalize_expert_weights: float | None = 1


class DbrxConfig(Strict):
    """DBRX's sizes: the published ones (`size: full`, 131.6 B parameters) or a tiny model's, and other keys."""

    ignored: ClassVar[frozenset[str]] = HOUSEKEEPING | {
        "init_device",
        "num_key_value_heads",
        "router_aux_loss_coef",
    }

    size: Literal["full", "tiny"] = "full"
    d_model: int = Field(6144, ge=1)
    n_heads: int = Field(48, ge=1)
    n_layers: int = Field(40, ge=1)
    max_seq_len: int = Field(32768, ge=1)
    vocab_size: int = Field(100352, ge=1)
    attn_config: DbrxAttention = DbrxAttention()
    rope_parameters: RopeParameters | None = (
        None  # transformers 5's; attn_config.rope_theta comes before it
    )
    ffn_config: DbrxFfn = DbrxFfn()
    tie_word_embeddings: bool = False
    resid_pdrop: Annotated[float, only(0, "dropout")] = 0.0
    emb_pdrop: Annotated[float, only(0, "dropout")] = 0.0


THETA = 500000.0
TINY: dict[str, Any] = {
    "d_model": 128,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 256,
    "vocab_size": 257,
    "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0},
    "ffn_config": {"ffn_hidden_size": 128},
}


def resolve(config: Mapping[str, Any]) -> TransformerConfig:
    """Read the keys of a `model:` section; raises ConfigError."""
    read = parse(
        DbrxConfig, merged(TINY, config) if config.get("size") == "tiny" else config, "model"
    )
    ffn, attention = read.ffn_config, read.attn_config
    check_divides("model.n_heads", read.n_heads, "d_model", read.d_model)
    check_divides("model.attn_config.kv_n_heads", attention.kv_n_heads, "n_heads", read.n_heads)
    rope = read.rope_parameters
    usual = THETA if rope is None else rope.rope_theta or 10000.0  # transformers' own
    return TransformerConfig(
        vocab_size=read.vocab_size,
        max_seq_len=read.max_seq_len,
        dim=read.d_model,
        layers=read.n_layers,
        heads=read.n_heads,
        kv_heads=attention.kv_n_heads,
        head_dim=read.d_model // read.n_heads,
        moe=ffn.moe(ffn.ffn_hidden_size),
        dense_layers=frozenset(ffn.dense_layers),
        dense_ffn_dim=ffn.ffn_hidden_size,
        dense_activation=ffn.activation(),
        norm="layer",
        rope_theta=attention.rope_theta or usual,
        rope_scaling=None if rope is None else rope.scaling,
        clip_qkv=attention.clip_qkv,
        tied_head=read.tie_word_embeddings,
        auxiliary=ffn.auxiliary(),
        expert_parallel=ffn.moe_world_size,
    )


class Dbrx(Transformer):
    """DBRX. The router's softmax and weights are in float32, as Databricks' own code has them.

    `config` is a `model:` section; the other arguments are Transformer's.
    """

    definition = "dbrx"
    schema: ClassVar[type[Strict]] = DbrxConfig
    resolve = staticmethod(resolve)

    def __init__(self, config: Mapping[str, Any], **placement: Any):
        super().__init__(resolve(config), **placement)
