"""The optimizer of a run: groups of parameters, each with a rate and an update rule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tokenyard_train.config.schema import OptimizerConfig
from tokenyard_train.engine.adamw import AdamW
from tokenyard_train.engine.precision import narrow
from tokenyard_train.engine.trainable import trainable
from tokenyard_train.engine.update_rule import ParameterState
from tokenyard_train.torch_private import keep_compiler_out_of_optimizers


class Optimizer(torch.optim.Optimizer):
    """Updates each group by its `rule`. Scales gradients, and can keep float32 masters of weights.

    A group has `params`, `lr`, its peak `initial_lr`, and `rule`. Does not import torch's compiler,
    which takes seconds.
    """

    def __init__(self, groups: list[dict[str, Any]]):
        keep_compiler_out_of_optimizers()
        super().__init__(groups, {})
        self._rules = {p: group["rule"] for group in groups for p in group["params"]}

    def narrow_weights(self, model: nn.Module) -> None:
        """Store all parameters of a model in bfloat16. Those that are trained keep their master.

        Call it before the first forward pass. Later changes of a weight from outside are lost.
        """
        for parameter in self._parameters():
            self.state_of(parameter)["master"] = parameter.detach()
        narrow(model)

    def widen_gradients(self) -> None:
        """Convert gradients to the dtype of the masters, float32, so that more can be added."""
        for parameter in self._parameters():
            master = self.master_of(parameter)
            if parameter.grad is not None and parameter.grad.dtype != master.dtype:
                wide = parameter.grad.to(master.dtype)
                parameter.grad_dtype = None  # the gradient may have any dtype
                parameter.grad = wide

    def master_of(self, parameter: Tensor) -> Tensor:
        """Return the tensor that the optimizer updates: the master, or the parameter itself."""
        return self.state_of(parameter).get("master", parameter.detach())

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the state of a parameter, which its rule creates if there is none."""
        if not self.state[parameter]:
            self.state[parameter] = self._rules[parameter].new_state(parameter)
        state: dict[str, Tensor] = self.state[parameter]
        return state

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: None = None, scale: Tensor | None = None
    ) -> None:
        """Update every parameter that has a gradient. `closure` must be None.

        `scale` is a scalar that multiplies all gradients. If it is not finite, nothing changes.
        """
        if scale is None:
            scale = torch.ones((), device=next(self._parameters()).device)
        for group in self.param_groups:
            parameters = [ParameterState(p, self.state_of(p)) for p in group["params"]]
            group["rule"].step(parameters, group["lr"], scale)

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    """Return the optimizer of all trainable parameters. All of them decay, as in Composer.

    `decoupled_adamw` (Loshchilov and Hutter 2017, arXiv 1711.05101, as in Composer) shrinks
    weights by lr / initial lr * weight_decay a step. torch's AdamW shrinks them by
    lr * weight_decay, so its weight_decay is divided by the initial lr.
    """
    decay = config.weight_decay
    if config.name == "decoupled_adamw":
        decay /= config.lr
    adamw = AdamW(config.betas, config.eps, decay)
    return Optimizer([_group(list(trainable(model).values()), config.lr, adamw)])


def _group(parameters: list[nn.Parameter], lr: float, rule: AdamW) -> dict[str, Any]:
    return {"params": parameters, "lr": lr, "initial_lr": lr, "rule": rule}
