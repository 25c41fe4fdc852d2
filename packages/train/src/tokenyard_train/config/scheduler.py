"""The keys of the learning-rate schedule, which are those of Composer and LLM Foundry."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from tokenyard_train.config.duration import Duration, Span
from tokenyard_train.data.schema import Section

Schedule = Literal[
    "cosine_with_warmup",
    "linear_decay_with_warmup",
    "constant_with_warmup",
    "inv_sqrt_with_warmup",
]

_KEYS = {
    "alpha": ("constant_with_warmup",),
    "alpha_i": ("linear_decay_with_warmup",),
    "t_scale": ("inv_sqrt_with_warmup",),
    "t_cooldown": ("inv_sqrt_with_warmup",),
    "alpha_f_decay": ("inv_sqrt_with_warmup",),
    "alpha_f_cooldown": ("inv_sqrt_with_warmup",),
}
"""The schedules in which a key has an effect, where it has none in the others."""


class SchedulerConfig(Section):
    """Learning-rate schedule: linear warm-up to the peak, then decay to alpha_f * peak at t_max."""

    ignored: ClassVar[frozenset[str]] = frozenset(("scale_warmup",))

    name: Schedule = "cosine_with_warmup"  # shape after the warm-up
    t_warmup: Duration = Span(0, "ba")  # length of the warm-up
    t_max: Duration = Span(1, "dur")  # end of the decay, from the start of the run
    alpha_f: float = Field(0.0, ge=0, le=1)  # final learning rate, as a fraction of the peak
    alpha: float = Field(1.0, gt=0, le=1e3)  # constant: learning rate, as a multiple of the peak
    alpha_i: float = Field(1.0, gt=0, le=1e3)  # linear: that at the end of the warm-up
    t_scale: Duration | None = None  # inv_sqrt, required: time in which the root falls by sqrt(2)
    t_cooldown: Duration | None = None  # inv_sqrt, required: length of a last, linear decay
    alpha_f_decay: float = Field(0.0, ge=0, le=1)  # inv_sqrt: limit of the decay
    alpha_f_cooldown: float = Field(0.0, ge=0, le=1)  # inv_sqrt: end of the last decay

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> SchedulerConfig:
        for key, names in _KEYS.items():
            default = type(self).model_fields[key].default
            if getattr(self, key) != default and self.name not in names:
                raise ValueError(
                    f"its {key} has no effect with name {self.name}; leave it out, it is for "
                    f"{names[0]}"
                )
        if self.name != "inv_sqrt_with_warmup":
            return self
        if self.alpha_f:
            raise ValueError(
                "its alpha_f has no effect with inv_sqrt_with_warmup; give alpha_f_"
                "decay or alpha_f_cooldown"
            )
        self._check_inverse_root()
        return self

    def _check_inverse_root(self) -> None:
        """Raise ValueError as LLM Foundry's scheduler does."""
        for key in ("t_scale", "t_cooldown"):
            if getattr(self, key) is None:
                raise ValueError(f"its {key} is missing, which inv_sqrt_with_warmup needs")
        if self.t_scale is not None and self.t_scale.value <= 0:
            raise ValueError(f"its t_scale is {self.t_scale}; it must be above 0")
        for key in ("t_warmup", "t_scale", "t_cooldown"):
            if getattr(self, key).unit == "dur":
                raise ValueError(
                    f"its {key} is {getattr(self, key)}, a share of a run that "
                    "inv_sqrt_with_warmup may continue; give ba, ep or tok"
                )
        if self.alpha_f_decay < self.alpha_f_cooldown:
            raise ValueError(
                f"its alpha_f_decay {self.alpha_f_decay} is below alpha_f_cooldown "
                f"{self.alpha_f_cooldown}: the learning rate would rise at the end"
            )
