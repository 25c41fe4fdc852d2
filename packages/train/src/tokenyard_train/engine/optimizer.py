"""The optimizer of a run: groups of parameters, each with a rate and an update rule."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from tokenyard import ConfigError
from tokenyard.fused_rows import fused_rows
from tokenyard.sharded import local_part
from tokenyard_train.config.optimizer import LION, MuonConfig, OptimizerConfig
from tokenyard_train.engine.adamw import AdamW
from tokenyard_train.engine.lion import Lion
from tokenyard_train.engine.moments import check_blocks
from tokenyard_train.engine.muon import Muon
from tokenyard_train.engine.precision import narrow
from tokenyard_train.engine.trainable import matching, trainable
from tokenyard_train.engine.update_rule import ParameterState, UpdateRule
from tokenyard_train.torch_private import keep_compiler_out_of_optimizers


class Optimizer(torch.optim.Optimizer):
    """Updates each group by its `rule`. Scales gradients, and can keep float32 masters of weights.

    A group has `params`, `lr`, its peak `initial_lr`, and `rule`. Does not import torch's compiler,
    which takes seconds.
    """

    def __init__(self, groups: list[dict[str, Any]]):
        keep_compiler_out_of_optimizers()
        super().__init__(groups, {})
        self._by_group: list[list[ParameterState]] = []  # once the first step is taken
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

    def moment_bytes(self) -> int:
        """Return the bytes of this rank's moments, without allocating any."""
        # On the meta device as it is: empty_like would import torch's symbolic shapes there
        meta = (p if p.is_meta else torch.empty_like(p, device="meta") for p in self._parameters())
        states = (self._rules[p].new_state(m) for p, m in zip(self._parameters(), meta))
        return sum(
            local_part(tensor).nbytes
            for state in states
            for name, tensor in state.items()
            if name != "step"
        )

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: None = None, scale: Tensor | None = None
    ) -> None:
        """Update every parameter that has a gradient. `closure` must be None.

        `scale` is a scalar that multiplies all gradients. If it is not finite, nothing changes.
        """
        if scale is None:
            scale = torch.ones((), device=next(self._parameters()).device)
        for group, parameters in zip(self.param_groups, self._states(), strict=True):
            group["rule"].step(parameters, group["lr"], scale)

    def _states(self) -> list[list[ParameterState]]:
        """Return the parameters and states of each group. They are always the same objects."""
        if not self._by_group:
            self._by_group = [
                [ParameterState(p, self.state_of(p)) for p in group["params"]]
                for group in self.param_groups
            ]
        return self._by_group

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    """Return the optimizer of all trainable parameters. All of them decay, as in Composer.

    `decoupled_adamw` (Loshchilov and Hutter 2017, arXiv 1711.05101, as in Composer) shrinks
    weights by lr / initial lr * weight_decay a step. torch's AdamW shrinks them by
    lr * weight_decay, so its weight_decay is divided by the initial lr. `decoupled_lionw` and
    `lionw` differ likewise.
    """
    decay = config.weight_decay
    if config.name.startswith("decoupled_"):
        decay /= config.lr
    if config.moments == "8bit":
        for name, parameter in trainable(model).items():
            check_blocks(name, parameter)
    parameters: list[Tensor] = list(trainable(model).values())
    if config.name in LION:
        return Optimizer([_group(parameters, config.lr, Lion(config.betas, decay, config.moments))])
    adamw = AdamW(config.betas, config.eps, decay, config.moments)
    if config.name != "muon":
        return Optimizer([_group(parameters, config.lr, adamw)])
    matrices = _muon_matrices(config.muon, model)
    muon = Muon(
        config.muon.momentum,
        decay,
        config.muon.ns_steps,
        config.muon.adjust_lr,
        matrices,
        config.moments,
    )
    rest = [p for p in parameters if p not in matrices]
    groups = [_group(list(matrices), config.lr, muon)]
    if rest:
        groups.append(_group(rest, config.muon.adamw_lr or config.lr, adamw))
    return Optimizer(groups)


def _group(parameters: list[Tensor], lr: float, rule: UpdateRule) -> dict[str, Any]:
    return {"params": parameters, "lr": lr, "initial_lr": lr, "rule": rule}


def _muon_matrices(config: MuonConfig, model: nn.Module) -> dict[Tensor, tuple[int, ...]]:
    """Return the parameters that Muon updates, and the rows of the matrices in each.

    Raises ConfigError for a pattern of `include` without a match, or if no matrix is chosen.
    """
    rows = fused_rows(model)
    chosen: dict[Tensor, tuple[int, ...]] = {
        parameter: rows.get(name, (parameter.shape[-2],))
        for name, parameter in matching(model, config.include, "optimizer.muon.include")
        if parameter.requires_grad
        and parameter.dim() in (2, 3)
        and not any(fnmatchcase(name, pattern) for pattern in config.exclude)
    }
    if not chosen:
        raise ConfigError(
            f"optimizer.muon: include {config.include} without exclude {config.exclude} leaves no "
            "matrix; give patterns such as blocks.*, or optimizer.name adamw"
        )
    return chosen
