"""The keys of the optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

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


class OptimizerConfig(Section):
    """AdamW, or Muon for matrices. `decoupled_adamw` multiplies decay by lr / initial lr.

    That is Composer's. `adamw` and `muon` multiply it by lr, as torch does.
    """

    name: Literal["decoupled_adamw", "adamw", "muon"] = (
        # adamw and decoupled_adamw differ in the weight decay; muon: see the section muon
        "decoupled_adamw"
    )
    lr: float = Field(6e-4, gt=0, le=1e3)  # peak learning rate
    betas: tuple[Beta, Beta] = (0.9, 0.95)  # decay rates of the first and second moments
    eps: float = Field(1e-8, gt=0, le=1)  # added to the square root of the second moment
    weight_decay: float = Field(
        0.0, ge=0, le=1e3
    )  # fraction of a weight that a step subtracts, scaled by `name`
    moments: Literal["fp32", "bf16", "8bit"] = (
        # how moments are stored; 8bit: in blocks of up to 256 with a scale
        "fp32"
    )
    muon: MuonConfig = MuonConfig()  # with name muon only

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
