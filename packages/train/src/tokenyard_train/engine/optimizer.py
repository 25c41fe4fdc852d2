"""AdamW and its learning rate schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tokenyard.sharded import group_by_mesh
from tokenyard_train.config.schema import OptimizerConfig, SchedulerConfig
from tokenyard_train.engine.trainable import trainable
from tokenyard_train.torch_private import keep_compiler_out_of_optimizers


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, with the same results, that does not import torch's compiler.

    That import takes seconds. All parameters have one dtype.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. `closure` must be None."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            states = [self.state_of(parameter) for parameter in parameters]
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                parameters,
                [parameter.grad for parameter in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the step count and moments of a parameter, zero before its first step."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> AdamW:
    """Return AdamW over all trainable parameters. All of them decay, as in Composer.

    `decoupled_adamw` (Loshchilov and Hutter 2017, arXiv 1711.05101, as in Composer) shrinks
    weights by lr / initial lr * weight_decay a step. torch's AdamW shrinks them by
    lr * weight_decay, so its weight_decay is divided by the initial lr.
    """
    decay = config.weight_decay
    if config.name == "decoupled_adamw":
        decay /= config.lr
    parameters = [{"params": group} for group in group_by_mesh(trainable(model).values())]
    keep_compiler_out_of_optimizers()
    return AdamW(
        parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=decay, fused=True
    )


def learning_rate(config: SchedulerConfig, peak: float, batch: int, warmup: int, end: int) -> float:
    """Return the learning rate of optimizer step `batch` (from 0), by Composer's formulas.

    It rises linearly from 0 to `peak` over `warmup` steps. Then it changes to alpha_f * peak at
    step `end`: along a half cosine (arXiv 1608.03983), linearly, or not at all.
    """
    if batch < warmup:
        return peak * batch / warmup
    passed = min(1.0, (batch - warmup) / max(1, end - warmup))
    match config.name:
        case "cosine_with_warmup":
            return peak * (
                config.alpha_f + (1 - config.alpha_f) * 0.5 * (1 + math.cos(math.pi * passed))
            )
        case "linear_decay_with_warmup":
            return peak * (1 + (config.alpha_f - 1) * passed)
        case "constant_with_warmup":
            return peak


def check_schedule(config: SchedulerConfig, warmup: int, end: int, batches: int) -> list[str]:
    """Return a sentence for each part of a schedule that makes no sense in a run of `batches`.

    `warmup` and `end` are `t_warmup` and `t_max` in steps.
    """
    if warmup >= batches:
        return [
            f"scheduler.t_warmup is {config.t_warmup}, and the run has {batches} steps: the "
            "learning rate never reaches optimizer.lr; give a shorter t_warmup, such as 0.1dur"
        ]
    if config.name == "constant_with_warmup":
        return []
    faults = []
    if warmup > 0 and warmup >= end:
        faults.append(
            f"scheduler.t_warmup is {config.t_warmup}, not less than t_max {config.t_max}: the "
            "learning rate falls from its peak to its end in one step; give a shorter t_warmup"
        )
    rest = batches - max(warmup, end)
    if config.alpha_f == 0 and rest > 0:
        faults.append(
            f"scheduler.t_max is {config.t_max}, and the run has {batches} steps: the last {rest} "
            "have a learning rate of 0; give t_max: 1dur, or an alpha_f above 0"
        )
    return faults
