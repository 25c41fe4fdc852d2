"""Rotary positions as config.json files tell them: `rope_parameters`, or `rope_theta` as before transformers 5."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from tokenyard_models.schema import Strict, only


class RopeParameters(Strict):
    """transformers 5's section for rotary positions; of its kinds, the plain one."""

    rope_type: Annotated[str, only("default", "another kind of rotary positions")] = "default"
    rope_theta: float = Field(10000.0, gt=0)
    partial_rotary_factor: Annotated[float, only(1.0, "rotating a part of each head")] = 1.0


class Rope(Strict):
    """The keys that say how positions are rotated; `rope_parameters` comes before `rope_theta`."""

    rope_theta: float = Field(10000.0, gt=0)
    rope_parameters: RopeParameters | None = None
    rope_scaling: Annotated[Any, only(None, "scaling rotary positions")] = None

    @property
    def theta(self) -> float:
        """Return the base of the rotations' frequencies."""
        return self.rope_theta if self.rope_parameters is None else self.rope_parameters.rope_theta
