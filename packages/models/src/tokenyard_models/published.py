"""Keys that config.json files have in common; rotary positions by `rope_parameters`, or as before transformers 5."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tokenyard import AuxiliaryLoss
from tokenyard_models.schema import HOUSEKEEPING, Strict, only


class RopeParameters(Strict):
    """transformers 5's section for rotary positions; of its kinds, the plain one."""

    rope_type: Annotated[str, only("default", "another kind of rotary positions")] = "default"
    rope_theta: float | None = Field(None, gt=0)  # if not given, the rope_theta beside this section
    partial_rotary_factor: Annotated[float, only(1.0, "rotating a part of each head")] = 1.0


class Rope(Strict):
    """The keys that say how positions are rotated; `rope_parameters` comes before `rope_theta`."""

    rope_theta: float = Field(10000.0, gt=0)
    rope_parameters: RopeParameters | None = None
    rope_scaling: Annotated[Any, only(None, "scaling rotary positions")] = None

    @property
    def theta(self) -> float:
        """Return the base of the rotations' frequencies."""
        return (self.rope_parameters and self.rope_parameters.rope_theta) or self.rope_theta


class Published(Rope):
    """What the config.json files of Llama's relatives have in common, and ours for what they do not have."""

    ignored: ClassVar[frozenset[str]] = HOUSEKEEPING

    size: Literal["full", "tiny"] = "full"
    max_position_embeddings: int = Field(4096, ge=1)
    max_seq_len: int | None = Field(None, ge=1)  # in place of max_position_embeddings
    hidden_act: Literal["silu"] = "silu"
    attention_dropout: Annotated[float, only(0, "dropout")] = 0.0
    tie_word_embeddings: bool = False

    @property
    def length(self) -> int:
        """Return how many positions there are."""
        return self.max_seq_len or self.max_position_embeddings


class PublishedMoE(Published):
    """What those of them with experts have in common: Mixtral, Qwen3-MoE and OLMoE."""

    router_aux_loss_coef: float = Field(0.01, ge=0)
    moe_world_size: int | None = Field(None, ge=1)
    moe_zloss_weight: float = Field(0.0, ge=0)
    moe_loss_convention: Literal["megablocks", "hf"] = "hf"

    def auxiliary(self) -> AuxiliaryLoss:
        """Return the losses of the routers."""
        return AuxiliaryLoss(self.router_aux_loss_coef, self.moe_zloss_weight, self.moe_loss_convention)
