"""The interface between the optimizer and its update rules, such as AdamW and Muon."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from tokenyard.sharded import local_part


class ParameterState(NamedTuple):
    """A trained parameter and its state. The properties are this rank's parts."""

    parameter: Tensor
    state: dict[str, Tensor]

    @property
    def weight(self) -> Tensor:
        """The tensor that the model computes with."""
        return local_part(self.parameter.detach())

    @property
    def master(self) -> Tensor:
        """The tensor that a rule updates: the master, or the weight itself."""
        master = self.state.get("master")
        return self.weight if master is None else local_part(master)

    @property
    def gradient(self) -> Tensor | None:
        """The gradient of the step, None without one."""
        gradient = self.parameter.grad
        return None if gradient is None else local_part(gradient)


class UpdateRule(Protocol):
    """Updates the parameters of a group. Its settings do not change; the learning rate does."""

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the state of a parameter before its first step, on the parameter's device.

        A scalar `step` counts steps. All other tensors are laid out like the parameter, and a
        checkpoint holds them.
        """
        ...

    def step(self, parameters: Sequence[ParameterState], lr: float, scale: Tensor) -> None:
        """Update the masters and weights of all parameters that have a gradient.

        `scale` is a scalar that multiplies all gradients. If it is not finite, nothing changes.
        """
        ...
