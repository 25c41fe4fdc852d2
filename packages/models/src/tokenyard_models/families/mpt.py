"""LLM Foundry's `mpt_causal_lm`: its keys and defaults, with an `ffn_config` that may ask for experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tokenyard import ConfigError
from tokenyard_models.config import TransformerConfig, check_divides
from tokenyard_models.ffn import FfnConfig, merged
from tokenyard_models.schema import Strict, only, parse
from tokenyard_models.transformer import Transformer


class RopeDail(Strict):
    """`rope_dail_config`: options of one implementation of rotary positions."""

    ignored: ClassVar[frozenset[str]] = frozenset(["pos_idx_in_fp32", "xpos_scale_base"])

    type: Annotated[str, only("original", "xPos")] = "original"


class RopeHf(Strict):
    """`rope_hf_config`: options of the other."""

    ignored: ClassVar[frozenset[str]] = frozenset(["factor"])

    type: Annotated[str, only("no_scaling", "scaling of rotary positions")] = "no_scaling"


class MptAttention(Strict):
    """LLM Foundry's `attn_config`, as far as this transformer goes."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        ["attn_impl", "fused_qkv", "rope_impl", "alibi_bias_max"]
    )

    attn_type: Literal["multihead_attention", "grouped_query_attention", "multiquery_attention"] = (
        "multihead_attention"
    )
    kv_n_heads: int | None = Field(None, ge=1)
    clip_qkv: float | None = Field(None, gt=0)
    rope: bool = False
    rope_theta: float = Field(10000.0, gt=0)
    rope_dail_config: RopeDail = RopeDail()
    rope_hf_config: RopeHf = RopeHf()
    attn_pdrop: Annotated[float, only(0, "dropout")] = 0.0
    alibi: Annotated[bool, only(False, "ALiBi")] = False
    qk_ln: Annotated[bool, only(False, "query-key normalisation")] = False
    qk_gn: Annotated[bool, only(False, "query-key normalisation")] = False
    prefix_lm: Annotated[bool, only(False, "a prefix language model")] = False
    softmax_scale: Annotated[float | None, only(None, "a softmax scale of its own")] = None
    sliding_window_size: Annotated[int, only(-1, "sliding-window attention")] = -1
    attn_uses_sequence_id: Annotated[bool, only(False, "attention within documents only")] = False
    kv_dim: Annotated[int | None, only(None, "attention to another sequence")] = None
    attn_logit_softcapping: Annotated[float | None, only(None, "logit soft-capping")] = None


class MptConfig(Strict):
    """A GPT-style decoder in LLM Foundry's keys; `size: tiny` gives small defaults, no size gives Foundry's."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        [
            "init_config",
            "init_device",
            "verbose",
            "use_cache",
            "fc_type",
            "attn_impl",
            "loss_fn",
            "use_train_metrics",
            "additional_train_metrics",
            "additional_eval_metrics",
            "precision",
            "tokenizer_name",
        ]
    )

    size: Literal["foundry", "tiny"] = "foundry"
    d_model: int = Field(2048, ge=1)
    n_heads: int = Field(16, ge=1)
    n_layers: int = Field(24, ge=1)
    expansion_ratio: float = Field(4, gt=0)
    max_seq_len: int = Field(2048, ge=1)
    vocab_size: int = Field(50368, ge=1)
    resid_pdrop: Annotated[float, only(0, "dropout")] = 0.0
    emb_pdrop: Annotated[float, only(0, "dropout")] = 0.0
    embedding_fraction: Annotated[float, only(1, "scaling the gradient of embeddings")] = 1.0
    learned_pos_emb: bool = True
    attn_config: MptAttention = MptAttention()
    ffn_config: FfnConfig = FfnConfig()
    logit_scale: Annotated[float | str | None, only(None, "a logit scale")] = None
    final_logit_softcapping: Annotated[float | None, only(None, "logit soft-capping")] = None
    no_bias: bool = False
    norm_type: Literal[
        "layernorm", "low_precision_layernorm", "rmsnorm", "low_precision_rmsnorm"
    ] = "layernorm"
    norm_eps: float = Field(1e-5, gt=0)
    tie_word_embeddings: bool = True
    use_pad_tok_in_ffn: Annotated[bool, only(True, "leaving padding out of the experts")] = True
    block_overrides: Annotated[Any, only(None, "overriding single blocks")] = None


TINY: dict[str, Any] = {
    "d_model": 128,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 256,
    "vocab_size": 257,
}


def resolve(config: Mapping[str, Any]) -> TransformerConfig:
    """Read the keys of a `model:` section; raises ConfigError."""
    read = parse(
        MptConfig, merged(TINY, config) if config.get("size") == "tiny" else config, "model"
    )
    ffn, attention = read.ffn_config, read.attn_config
    if not attention.rope and not read.learned_pos_emb:
        raise ConfigError(
            "model.learned_pos_emb and model.attn_config.rope are both false; one must be true"
        )
    check_divides("model.n_heads", read.n_heads, "d_model", read.d_model)
    ffn_dim = _ffn_dim(read)
    return TransformerConfig(
        vocab_size=read.vocab_size,
        max_seq_len=read.max_seq_len,
        dim=read.d_model,
        layers=read.n_layers,
        heads=read.n_heads,
        kv_heads=_kv_heads(read),
        head_dim=read.d_model // read.n_heads,
        moe=ffn.moe(ffn_dim, bias=not read.no_bias),
        dense_ffn_dim=ffn_dim,
        dense_layers=frozenset(ffn.dense_layers),
        dense_activation=ffn.activation(),
        bias=not read.no_bias,
        norm="rms" if read.norm_type.endswith("rmsnorm") else "layer",
        norm_eps=read.norm_eps,
        rope_theta=attention.rope_theta if attention.rope else None,
        clip_qkv=attention.clip_qkv,
        tied_head=read.tie_word_embeddings,
        auxiliary=ffn.auxiliary(),
        expert_parallel=ffn.moe_world_size,
    )


def _ffn_dim(read: MptConfig) -> int:
    width = read.ffn_config.ffn_hidden_size or read.d_model * read.expansion_ratio
    if width != int(width):
        product = f"d_model {read.d_model} * expansion_ratio {read.expansion_ratio}"
        raise ConfigError(
            f"model.expansion_ratio: {product} is {width}, which must be a whole number"
        )
    return int(width)


def _kv_heads(read: MptConfig) -> int:
    kind, given = read.attn_config.attn_type, read.attn_config.kv_n_heads
    default = 1 if kind == "multiquery_attention" else read.n_heads
    if kind == "grouped_query_attention" and given is None:
        raise ConfigError(
            "model.attn_config.kv_n_heads is missing; grouped_query_attention needs it"
        )
    if kind != "grouped_query_attention" and given not in (None, default):
        raise ConfigError(f"model.attn_config.kv_n_heads is {given}, but {kind} has {default}")
    heads = given or default
    check_divides("model.attn_config.kv_n_heads", heads, "n_heads", read.n_heads)
    return heads


class Mpt(Transformer):
    """LLM Foundry's causal language model. `config` is a `model:` section; the other arguments are Transformer's."""

    definition = "mpt_causal_lm"
    schema: ClassVar[type[Strict]] = MptConfig
    resolve = staticmethod(resolve)

    def __init__(self, config: Mapping[str, Any], **placement: Any):
        super().__init__(resolve(config), **placement)
