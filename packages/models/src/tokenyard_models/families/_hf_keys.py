"""Read the config.json keys that several families share.

Rotary positions come as `rope_parameters`, or as separate keys from transformers before 5.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tokenyard import AuxiliaryLoss, ConfigError, RoutingRule
from tokenyard_models.config import MoEConfig, TransformerConfig, check_divides, check_top_k
from tokenyard_models.families._definition import ModelConfig
from tokenyard_models.rope_scaling import RopeScaling
from tokenyard_models.strict_config import HOUSEKEEPING, Strict, only


class RopeParameters(Strict):
    """transformers' section for rotary positions: plain, or scaled as in Llama 3.1."""

    rope_type: Literal["default", "llama3"] | None = None  # default, if `type` is not set either
    type: Literal["default", "llama3"] | None = None  # older name of rope_type
    rope_theta: float | None = Field(None, gt=0)  # default: the rope_theta beside this section
    partial_rotary_factor: Annotated[float, only(1.0, "rotating a part of each head")] = 1.0
    factor: float | None = Field(None, ge=1)  # llama3, which needs this key and those below
    low_freq_factor: float | None = Field(None, gt=0)
    high_freq_factor: float | None = Field(None, gt=0)
    original_max_position_embeddings: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        missing = [name for name, value in self._scaling_keys.items() if value is None]
        if self._is_scaled and missing:
            raise ValueError(f"rope_type llama3 needs {' and '.join(missing)} too")
        return self

    @property
    def scaling(self) -> RopeScaling | None:
        """Return Llama 3.1's scaling of the frequencies, or None."""
        return RopeScaling(**self._scaling_keys) if self._is_scaled else None

    @property
    def _is_scaled(self) -> bool:
        return (self.rope_type or self.type) == "llama3"

    @property
    def _scaling_keys(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(RopeScaling)}


class LlamaKeys(ModelConfig):
    """The config.json keys of Llama and its relatives, and keys that only this project has."""

    ignored: ClassVar[frozenset[str]] = HOUSEKEEPING

    size: Literal["full", "tiny"] = "full"  # default sizes
    vocab_size: int = Field(ge=1)  # V
    hidden_size: int = Field(ge=1)  # D
    intermediate_size: int = Field(ge=1)  # F
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int | None = Field(None, ge=1)  # default: num_attention_heads
    max_position_embeddings: int = Field(4096, ge=1)  # longest sequence
    max_seq_len: int | None = Field(None, ge=1)  # overrides max_position_embeddings
    rms_norm_eps: float = Field(1e-5, gt=0)
    rope_theta: float = Field(10000.0, gt=0)  # the rope sections override it
    rope_parameters: RopeParameters | None = None
    rope_scaling: RopeParameters | None = None  # name of rope_parameters before transformers 5
    rope_interleaved: Annotated[bool, only(False, "rotating neighbours")] = False
    hidden_act: Literal["silu"] = "silu"  # activation of the feed-forward layers
    attention_dropout: Annotated[float, only(0, "dropout")] = 0.0
    tie_word_embeddings: bool = False  # the head is the embedding

    @property
    def length(self) -> int:
        """Return the number of positions."""
        return self.max_seq_len or self.max_position_embeddings

    def transformer(self, head_dim: int | None = None, **extra: Any) -> TransformerConfig:
        """Return a TransformerConfig of the shared keys and a family's `extra` fields.

        `head_dim` defaults to hidden_size / num_attention_heads. Raises ConfigError if the heads
        do not divide.
        """
        heads = self.num_attention_heads
        kv_heads = self.num_key_value_heads or heads
        if head_dim is None:
            check_divides("model.num_attention_heads", heads, "hidden_size", self.hidden_size)
        check_divides("model.num_key_value_heads", kv_heads, "num_attention_heads", heads)
        sections = [s for s in (self.rope_parameters, self.rope_scaling) if s is not None]
        if len({s.rope_theta for s in sections if s.rope_theta}) > 1:
            raise ConfigError(
                f"model.rope_parameters.rope_theta is {sections[0].rope_theta} and "
                f"model.rope_scaling.rope_theta is {sections[1].rope_theta}; they mean the same, "
                "set one"
            )
        return TransformerConfig(
            vocab_size=self.vocab_size,
            max_seq_len=self.length,
            dim=self.hidden_size,
            layers=self.num_hidden_layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim or self.hidden_size // heads,
            norm_eps=self.rms_norm_eps,
            rope_theta=next((s.rope_theta for s in sections if s.rope_theta), self.rope_theta),
            rope_scaling=next((s.scaling for s in sections if s.scaling), None),
            tied_head=self.tie_word_embeddings,
            **extra,
        )


class LlamaMoEKeys(LlamaKeys):
    """The keys that Mixtral, Qwen3-MoE and OLMoE share."""

    num_experts_per_tok: int = Field(ge=1)  # K
    router_aux_loss_coef: float = Field(0.01, ge=0)  # weight of the load-balancing loss
    moe_world_size: int | None = Field(None, ge=1)  # expert-parallel ranks
    moe_zloss_weight: float = Field(0.0, ge=0)  # weight of the z-loss
    moe_loss_convention: Literal["megablocks", "hf"] = "hf"  # scale of the load-balancing loss
    uniform_expert_assignment: bool = False  # slots take experts in turn, for benchmarks

    def experts(self, ffn_dim: int, key: str, rule: RoutingRule) -> MoEConfig:
        """Return the MoE layers; `key` names the number of experts. Raises ConfigError."""
        num_experts = getattr(self, key)
        check_top_k("model.num_experts_per_tok", self.num_experts_per_tok, key, num_experts)
        return MoEConfig(
            ffn_dim,
            num_experts,
            self.num_experts_per_tok,
            rule=rule,
            forced_balance=self.uniform_expert_assignment,
        )

    def transformer(self, head_dim: int | None = None, **extra: Any) -> TransformerConfig:
        """Return a TransformerConfig that also has the routers' losses and expert parallelism."""
        auxiliary = AuxiliaryLoss(
            self.router_aux_loss_coef, self.moe_zloss_weight, self.moe_loss_convention
        )
        return super().transformer(
            head_dim, auxiliary=auxiliary, expert_parallel=self.moe_world_size, **extra
        )


def check_window(window: int | None, length: int) -> None:
    """Raise ConfigError for a sliding window shorter than the longest sequence."""
    if window is not None and window < length:
        raise ConfigError(
            f"model.sliding_window is {window}, and there are {length} positions; attention "
            f"within windows is not supported: give a max_seq_len of at most {window}, where a "
            "window is the whole text"
        )
