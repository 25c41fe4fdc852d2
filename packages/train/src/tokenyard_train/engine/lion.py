"""Lion: the sign of an interpolation between momentum and gradient, with one moment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenyard_train.engine.moments import new_moment, read_moment, write_moment
from tokenyard_train.engine.update_rule import ParameterState

_MOMENT = "exp_avg"


class Lion:
    """Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2).

    A step subtracts lr * weight_decay * p and lr * sign(m interpolated to the gradient by
    1 - betas[0]) from a weight p, then moves the momentum m to the gradient by 1 - betas[1].
    `moments` is the storage of m: fp32, bf16 or 8bit.
    """

    def __init__(self, betas: tuple[float, float], weight_decay: float, moments: str = "fp32"):
        self.betas = betas
        self.weight_decay = weight_decay
        self.moments = moments

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return a momentum of zero."""
        return new_moment(_MOMENT, parameter, self.moments)

    def step(self, parameters: Sequence[ParameterState], lr: float, scale: Tensor) -> None:
        """Update the parameters. The host does not wait for the scale."""
        rate = scale.isfinite().double() * lr
        for one in parameters:
            if one.gradient is None or one.weight.numel() == 0:
                continue
            master = one.master
            master.mul_((1 - rate * self.weight_decay).to(master.dtype))
            master.sub_(self._sign(one, scale).to(master.dtype) * rate.to(master.dtype))
            if "master" in one.state:
                one.weight.copy_(master)

    def _sign(self, one: ParameterState, scale: Tensor) -> Tensor:
        """Return the direction of the update, and move the momentum.

        If the scale is not finite, the momentum stays as it is.
        """
        momentum = read_moment(one.state, _MOMENT)
        assert one.gradient is not None
        gradient = one.gradient.to(momentum.dtype) * scale.to(momentum.dtype)
        gradient = torch.where(scale.isfinite(), gradient, momentum)
        direction = momentum.lerp(gradient, 1 - self.betas[0]).sign_()
        momentum.lerp_(gradient, 1 - self.betas[1])
        write_moment(one.state, _MOMENT, momentum, scale.isfinite())
        return direction
