"""LLM Foundry's `mpt_causal_lm`: a GPT-style decoder, dense or with experts (`ffn_config`).

The keys and defaults are LLM Foundry's.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tokenyard import ConfigError
from tokenyard_models.config import TransformerConfig, check_divides
from tokenyard_models.families._definition import Definition, ModelConfig
from tokenyard_models.ffn_config import FfnConfig
from tokenyard_models.strict_config import Strict, only


class RopeDail(Strict):
    """Options of rotary positions as flash-attention (dail) implements them."""

    ignored: ClassVar[frozenset[str]] = frozenset(["pos_idx_in_fp32", "xpos_scale_base"])

    type: Annotated[str, only("original", "xPos")] = "original"


class RopeHf(Strict):
    """Options of rotary positions as Hugging Face implements them."""

    ignored: ClassVar[frozenset[str]] = frozenset(["factor"])

    type: Annotated[str, only("no_scaling", "scaling of rotary positions")] = "no_scaling"


class MptAttention(Strict):
    """Attention. Only a part of LLM Foundry's `attn_config` is supported."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        ["attn_impl", "fused_qkv", "rope_impl", "alibi_bias_max"]
    )

    attn_type: Literal["multihead_attention", "grouped_query_attention", "multiquery_attention"] = (
        "multihead_attention"  # sets the default of kv_n_heads
    )
    kv_n_heads: int | None = Field(None, ge=1)  # key and value heads
    clip_qkv: float | None = Field(None, gt=0)  # clamp queries, keys and values to +-clip_qkv
    rope: bool = False  # rotary positions
    rope_theta: float = Field(10000.0, gt=0)  # base of the rotary frequencies
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


class MptConfig(ModelConfig):
    """LLM Foundry's keys. Defaults: LLM Foundry's (`size: foundry`) or `size: tiny`."""

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

    size: Literal["foundry", "tiny"] = "foundry"  # default sizes
    d_model: int = Field(2048, ge=1)  # D
    n_heads: int = Field(16, ge=1)  # query heads
    n_layers: int = Field(24, ge=1)
    expansion_ratio: float = Field(4, gt=0)  # F / D, unless ffn_hidden_size is set
    max_seq_len: int = Field(2048, ge=1)  # longest sequence
    vocab_size: int = Field(50368, ge=1)  # V
    resid_pdrop: Annotated[float, only(0, "dropout")] = 0.0
    emb_pdrop: Annotated[float, only(0, "dropout")] = 0.0
    embedding_fraction: Annotated[float, only(1, "scaling the gradient of embeddings")] = 1.0
    learned_pos_emb: bool = True  # learned positions, unless attn_config.rope is true
    attn_config: MptAttention = MptAttention()
    ffn_config: FfnConfig = FfnConfig()
    logit_scale: Annotated[float | str | None, only(None, "a logit scale")] = None
    final_logit_softcapping: Annotated[float | None, only(None, "logit soft-capping")] = None
    no_bias: bool = False  # true: no layer has a bias
    norm_type: Literal[
        "layernorm", "low_precision_layernorm", "rmsnorm", "low_precision_rmsnorm"
    ] = "layernorm"  # low_precision_ has no effect
    norm_eps: float = Field(1e-5, gt=0)
    tie_word_embeddings: bool = True  # the head is the embedding
    use_pad_tok_in_ffn: Annotated[bool, only(True, "leaving padding out of the experts")] = True
    block_overrides: Annotated[Any, only(None, "overriding single blocks")] = None

    def resolve(self) -> TransformerConfig:
        """Return the config of the transformer. Raises ConfigError."""
        ffn = self.ffn_config
        attention = self.attn_config
        if not attention.rope and not self.learned_pos_emb:
            raise ConfigError(
                "model.learned_pos_emb and model.attn_config.rope are both false; one must be true"
            )
        check_divides("model.n_heads", self.n_heads, "d_model", self.d_model)
        ffn_dim = self._ffn_dim()
        return TransformerConfig(
            vocab_size=self.vocab_size,
            max_seq_len=self.max_seq_len,
            dim=self.d_model,
            layers=self.n_layers,
            heads=self.n_heads,
            kv_heads=self._kv_heads(),
            head_dim=self.d_model // self.n_heads,
            moe=ffn.moe(ffn_dim, bias=not self.no_bias),
            dense_ffn_dim=ffn_dim,
            dense_layers=frozenset(ffn.dense_layers),
            dense_activation=ffn.activation(),
            bias=not self.no_bias,
            norm="rms" if self.norm_type.endswith("rmsnorm") else "layer",
            norm_eps=self.norm_eps,
            rope_theta=attention.rope_theta if attention.rope else None,
            clip_qkv=attention.clip_qkv,
            tied_head=self.tie_word_embeddings,
            auxiliary=ffn.auxiliary(),
            expert_parallel=ffn.moe_world_size,
        )

    def _ffn_dim(self) -> int:
        width = self.ffn_config.ffn_hidden_size or self.d_model * self.expansion_ratio
        if width != int(width):
            product = f"d_model {self.d_model} * expansion_ratio {self.expansion_ratio}"
            raise ConfigError(
                f"model.expansion_ratio: {product} is {width}, which must be a whole number"
            )
        return int(width)

    def _kv_heads(self) -> int:
        kind = self.attn_config.attn_type
        kv_heads = self.attn_config.kv_n_heads
        default = 1 if kind == "multiquery_attention" else self.n_heads
        if kind == "grouped_query_attention" and kv_heads is None:
            raise ConfigError(
                "model.attn_config.kv_n_heads is missing; grouped_query_attention needs it"
            )
        if kind != "grouped_query_attention" and kv_heads not in (None, default):
            raise ConfigError(
                f"model.attn_config.kv_n_heads is {kv_heads}, but {kind} has {default}"
            )
        kv_heads = kv_heads or default
        check_divides("model.attn_config.kv_n_heads", kv_heads, "n_heads", self.n_heads)
        return kv_heads


class Mpt(Definition):
    """LLM Foundry's causal language model."""

    definition = "mpt_causal_lm"
    schema = MptConfig
    readme = (
        "LLM Foundry's, with `ffn_config`",
        "LLM Foundry's defaults, or `size: tiny`",
    )
    tiny: ClassVar[dict[str, Any]] = {
        "d_model": 128,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 256,
        "vocab_size": 257,
    }
