"""Keys that config.json files have in common; rotary positions by `rope_parameters`, or as before transformers 5."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tokenyard import AuxiliaryLoss, ConfigError
from tokenyard_models.rotary import RopeScaling
from tokenyard_models.schema import HOUSEKEEPING, Strict, only


class RopeParameters(Strict):
    """transformers' section for rotary positions; of its kinds, the plain one and Llama 3.1's."""

    rope_type: Literal["default", "llama3"] | None = None  # default, if `type` is not given either
    type: Literal["default", "llama3"] | None = None  # rope_type, as older versions call it
    rope_theta: float | None = Field(None, gt=0)  # if not given, the rope_theta beside this section
    partial_rotary_factor: Annotated[float, only(1.0, "rotating a part of each head")] = 1.0
    factor: float | None = Field(
        None, ge=1
    )  # this and those below are llama3's, which needs all of them
    low_freq_factor: float | None = Field(None, gt=0)
    high_freq_factor: float | None = Field(None, gt=0)
    original_max_position_embeddings: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        missing = [name for name, value in self._stretching.items() if value is None]
        if self._stretches and missing:
            raise ValueError(f"rope_type llama3 needs {' and '.join(missing)} too")
        return self

    @property
    def scaling(self) -> RopeScaling | None:
        """Return how the rotations are stretched."""
        return RopeScaling(**self._stretching) if self._stretches else None

    @property
    def _stretches(self) -> bool:
        return (self.rope_type or self.type) == "llama3"

    @property
    def _stretching(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(RopeScaling)}


class Rope(Strict):
    """The keys that say how positions are rotated; the sections come before `rope_theta`."""

    rope_theta: float = Field(10000.0, gt=0)
    rope_parameters: RopeParameters | None = None
    rope_scaling: RopeParameters | None = (
        None  # rope_parameters, as it is called before transformers 5
    )
    rope_interleaved: Annotated[bool, only(False, "rotating neighbours")] = False

    @property
    def theta(self) -> float:
        """Return the base of the rotations' frequencies."""
        return next((s.rope_theta for s in self._sections if s.rope_theta), self.rope_theta)

    @property
    def scaling(self) -> RopeScaling | None:
        """Return how the rotations are stretched."""
        return next((s.scaling for s in self._sections if s.scaling), None)

    @property
    def _sections(self) -> list[RopeParameters]:
        return [
            section for section in (self.rope_parameters, self.rope_scaling) if section is not None
        ]


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


def check_window(window: int | None, length: int) -> None:
    """Raise ConfigError for a window of attention that is shorter than the text: each token is to see all before it."""
    if window is not None and window < length:
        raise ConfigError(
            f"model.sliding_window is {window}, and there are {length} positions; attention within windows is not "
            f"supported: give a max_seq_len of at most {window}, where a window is the whole text"
        )


class PublishedMoE(Published):
    """What those of them with experts have in common: Mixtral, Qwen3-MoE and OLMoE."""

    router_aux_loss_coef: float = Field(0.01, ge=0)
    moe_world_size: int | None = Field(None, ge=1)
    moe_zloss_weight: float = Field(0.0, ge=0)
    moe_loss_convention: Literal["megablocks", "hf"] = "hf"

    def auxiliary(self) -> AuxiliaryLoss:
        """Return the losses of the routers."""
        return AuxiliaryLoss(
            self.router_aux_loss_coef, self.moe_zloss_weight, self.moe_loss_convention
        )
