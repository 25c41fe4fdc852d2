"""DBRX (Databricks 2024): top-4 routing over 16 experts, clipped attention, LayerNorm without bias.

The keys are those of the published config.json.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tokenyard_models.config import TransformerConfig, check_divides
from tokenyard_models.families._boxes import copy, stacked, stacked_transposed
from tokenyard_models.families._config_json import experts, rope_parameters
from tokenyard_models.families._definition import Definition, ModelConfig
from tokenyard_models.families._format import HfFormat, Row
from tokenyard_models.families._hf_keys import RopeParameters
from tokenyard_models.families._names import BLOCK, DOWN, ROUTER, UP, names
from tokenyard_models.ffn_config import ActivationName, FfnConfig
from tokenyard_models.strict_config import HOUSEKEEPING, Strict, only

THETA = 500000.0
TRANSFORMERS_THETA = 10000.0


class DbrxAttention(Strict):
    """Grouped-query attention."""

    ignored: ClassVar[frozenset[str]] = HOUSEKEEPING | {"attn_impl"}

    kv_n_heads: int = Field(8, ge=1)  # key and value heads
    clip_qkv: float | None = Field(8.0, gt=0)  # clamp queries, keys and values to +-clip_qkv
    rope_theta: float | None = Field(None, gt=0)  # default: rope_parameters' or 500,000
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


class DbrxConfig(ModelConfig):
    """DBRX's keys. Defaults: as published (`size: full`, 131.6 B parameters) or `size: tiny`."""

    ignored: ClassVar[frozenset[str]] = HOUSEKEEPING | {
        "init_device",
        "num_key_value_heads",
        "router_aux_loss_coef",
    }

    size: Literal["full", "tiny"] = "full"  # default sizes
    d_model: int = Field(6144, ge=1)  # D
    n_heads: int = Field(48, ge=1)  # query heads
    n_layers: int = Field(40, ge=1)
    max_seq_len: int = Field(32768, ge=1)  # longest sequence
    vocab_size: int = Field(100352, ge=1)  # V
    attn_config: DbrxAttention = DbrxAttention()
    rope_parameters: RopeParameters | None = None  # of transformers 5; attn_config overrides it
    ffn_config: DbrxFfn = DbrxFfn()
    tie_word_embeddings: bool = False  # the head is the embedding
    resid_pdrop: Annotated[float, only(0, "dropout")] = 0.0
    emb_pdrop: Annotated[float, only(0, "dropout")] = 0.0

    def resolve(self) -> TransformerConfig:
        """Return the config of the transformer. Raises ConfigError."""
        ffn = self.ffn_config
        attention = self.attn_config
        check_divides("model.n_heads", self.n_heads, "d_model", self.d_model)
        check_divides("model.attn_config.kv_n_heads", attention.kv_n_heads, "n_heads", self.n_heads)
        rope = self.rope_parameters
        theta = THETA if rope is None else rope.rope_theta or TRANSFORMERS_THETA
        return TransformerConfig(
            vocab_size=self.vocab_size,
            max_seq_len=self.max_seq_len,
            dim=self.d_model,
            layers=self.n_layers,
            heads=self.n_heads,
            kv_heads=attention.kv_n_heads,
            head_dim=self.d_model // self.n_heads,
            moe=ffn.moe(ffn.ffn_hidden_size),
            dense_layers=frozenset(ffn.dense_layers),
            dense_ffn_dim=ffn.ffn_hidden_size,
            dense_activation=ffn.activation(),
            norm="layer",
            rope_theta=attention.rope_theta or theta,
            rope_scaling=None if rope is None else rope.scaling,
            clip_qkv=attention.clip_qkv,
            tied_head=self.tie_word_embeddings,
            auxiliary=ffn.auxiliary(),
            expert_parallel=ffn.moe_world_size,
        )


class Dbrx(Definition):
    """DBRX. The router's softmax and weights are in float32, as in Databricks' code."""

    definition = "dbrx"
    schema = DbrxConfig
    readme = (
        "DBRX's published config.json",
        "`size: full` (131.6 B, 36.5 B active) or `tiny`",
    )
    tiny: ClassVar[dict[str, Any]] = {
        "d_model": 128,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 256,
        "vocab_size": 257,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 128},
    }


HF_BLOCK = "transformer.blocks.{layer}."
ATTENTION = HF_BLOCK + "norm_attn_norm."
EXPERTS = HF_BLOCK + "ffn.experts.mlp."
WEIGHTS = (
    Row("embed.weight", ("transformer.wte.weight",), copy),
    Row(BLOCK + "norm_1.weight", (ATTENTION + "norm_1.weight",), copy),
    Row(BLOCK + "attention.qkv.weight", (ATTENTION + "attn.Wqkv.weight",), copy),
    Row(BLOCK + "attention.out.weight", (ATTENTION + "attn.out_proj.weight",), copy),
    Row(BLOCK + "norm_2.weight", (ATTENTION + "norm_2.weight",), copy),
    Row(ROUTER, (HF_BLOCK + "ffn.router.layer.weight",), copy),
    Row(UP, names(EXPERTS, "w1", "v1"), stacked),
    Row(DOWN, (EXPERTS + "w2",), stacked_transposed),
    Row("norm.weight", ("transformer.norm_f.weight",), copy),
    Row("head.weight", ("lm_head.weight",), copy),
)


_ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}
"""The activation of the gate, by core's name of the gated activation."""


def config_json(config: TransformerConfig) -> dict[str, Any]:
    """Return DBRX's config.json. Raises ConfigError for a dense model.

    The file has the base of the rotary positions twice: transformers reads only `rope_parameters`.
    """
    moe = experts(config)
    return {
        "architectures": ["DbrxForCausalLM"],
        "model_type": "dbrx",
        "d_model": config.dim,
        "n_heads": config.heads,
        "n_layers": config.layers,
        "max_seq_len": config.max_seq_len,
        "vocab_size": config.vocab_size,
        "attn_config": {
            "kv_n_heads": config.kv_heads,
            "clip_qkv": config.clip_qkv,
            "rope_theta": config.rope_theta,
        },
        "ffn_config": {
            "ffn_act_fn": {"name": _ACTIVATIONS.get(moe.activation, "silu")},
            "ffn_hidden_size": moe.ffn_dim,
            "hidden_size": config.dim,
            "moe_num_experts": moe.num_experts,
            "moe_top_k": moe.top_k,
            "moe_jitter_eps": moe.rule.jitter or None,
            "moe_loss_weight": config.auxiliary.balance_weight,
            "moe_normalize_expert_weights": moe.rule.normalize,
        },
        "rope_parameters": rope_parameters(config),
        "router_aux_loss_coef": config.auxiliary.balance_weight,
        "tie_word_embeddings": config.tied_head,
    }


def refuses(config: TransformerConfig) -> str | None:
    """Return why transformers cannot load or compute a DBRX of this config, or None."""
    if config.tied_head:
        return "tie_word_embeddings is true"
    if config.clip_qkv is None:
        return "attn_config.clip_qkv is null, and torch.clamp needs a bound"
    return None


DEFAULTS = {
    "d_model": 2048,
    "n_heads": 16,
    "n_layers": 24,
    "max_seq_len": 2048,
    "vocab_size": 32000,
    "attn_config": {"kv_n_heads": 1, "clip_qkv": None},
    "ffn_config": {
        "ffn_hidden_size": 3584,
        "mlp_type": "glu",
        "moe_num_experts": 4,
        "moe_top_k": 1,
        "moe_loss_weight": 0.01,
        "moe_normalize_expert_weights": 1.0,
    },
}
FORMATS = (HfFormat(Dbrx, "dbrx", WEIGHTS, config_json, DEFAULTS, refuses=refuses),)
