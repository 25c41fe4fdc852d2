"""The keys of the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from tokenyard_train.data.schema import Section


def _check_beta(beta: float) -> float:
    if beta > 1 - 1e-9:
        raise ValueError("it leaves nothing of a new gradient; give 0.9999 or less")
    return beta


Beta = Annotated[float, Field(ge=0, lt=1), AfterValidator(_check_beta)]


_MOST_BF16 = 0.995
"""Highest decay rate of a moment in bfloat16, about 1 - 2^-8: a slower decay is rounded away."""


class MuonConfig(Section):
    """Muon updates the matrices that match `include` and not `exclude`; AdamW updates the rest."""

    include: list[str] = ["blocks.*"]  # name patterns of matrices, and of stacks of matrices
    exclude: list[str] = ["*bias", "*.router.*", "*.adapter.*"]  # name patterns left to AdamW
    momentum: Beta = 0.95  # decay rate of the momentum, which is Nesterov's
    ns_steps: int = Field(5, ge=1, le=99)  # Newton-Schulz iterations of a step
    adjust_lr: Literal["match_rms_adamw", "original"] = (
        # match_rms_adamw: updates are as large as AdamW's, so that lr is a rate for AdamW;
        # original: lr is a rate for Muon, such as 0.02
        "match_rms_adamw"
    )
    adamw_lr: float | None = Field(
        None, gt=0, le=1e3
    )  # peak learning rate of the rest; None: optimizer.lr


LION = ("lionw", "decoupled_lionw")
"""The names of Lion."""

_LION_DEFAULTS = {"lr": 1e-4, "betas": (0.9, 0.99)}  # of LLM Foundry's DecoupledLionW


class OptimizerConfig(Section):
    """AdamW, Lion, or Muon for matrices. `decoupled_` multiplies decay by lr / initial lr.

    That is Composer's. `adamw`, `lionw` and `muon` multiply it by lr, as torch does.
    """

    name: Literal["decoupled_adamw", "adamw", "decoupled_lionw", "lionw", "muon"] = (
        # decoupled_ differs in the weight decay; muon: see the section muon
        "decoupled_adamw"
    )
    lr: float = Field(6e-4, gt=0, le=1e3)  # peak learning rate; of Lion, 1e-4
    betas: tuple[Beta, Beta] = (
        # decay rates of the first and second moments; of Lion, (0.9, 0.99): that of the
        # interpolation, and that of the moment
        (0.9, 0.95)
    )
    eps: float = Field(1e-8, gt=0, le=1)  # added to the square root of the second moment
    weight_decay: float = Field(
        0.0, ge=0, le=1e3
    )  # fraction of a weight that a step subtracts, scaled by `name`
    moments: Literal["fp32", "bf16", "8bit"] = (
        # how moments are stored; 8bit: in blocks of up to 256 with a scale
        "fp32"
    )
    muon: MuonConfig = MuonConfig()  # with name muon only

    @model_validator(mode="before")
    @classmethod
    def _lion_has_other_defaults(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or data.get("name") not in LION:
            return data
        given = {key: value for key, value in data.items() if value is not None}
        if given.get("eps", 1e-8) != 1e-8:
            raise ValueError(f"eps is {given['eps']}, and {given['name']} has none; leave it out")
        return _LION_DEFAULTS | given

    @model_validator(mode="after")
    def _bf16_holds_changes(self) -> OptimizerConfig:
        rate = max(*self.betas, self.muon.momentum)
        if self.moments == "bf16" and rate > _MOST_BF16:
            raise ValueError(
                f"moments is bf16, whose rounding undoes a decay by {rate} a step; give betas and "
                f"momentum of at most {_MOST_BF16}, or moments fp32 or 8bit"
            )
        return self

    @model_validator(mode="after")
    def _muon_has_its_name(self) -> OptimizerConfig:
        if self.name != "muon" and self.muon != MuonConfig():
            raise ValueError(f"its section muon needs name muon, and name is {self.name}")
        return self
