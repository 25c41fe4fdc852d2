"""AdamW, with float32 masters of weights that are stored in bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from tokenyard.sharded import local_part
from tokenyard_train.config.schema import OptimizerConfig
from tokenyard_train.engine.precision import narrow
from tokenyard_train.engine.trainable import trainable
from tokenyard_train.torch_private import fused_adamw, keep_compiler_out_of_optimizers

if TYPE_CHECKING:
    from tokenyard_kernels_triton.optimizer import FusedAdamW

MOMENTS = ("exp_avg", "exp_avg_sq")
_KERNELS = ("triton", "tokenyard_kernels_triton")  # modules of the kernel


class _Update(NamedTuple):
    """The local tensors of one parameter with a gradient."""

    weight: Tensor
    master: Tensor
    gradient: Tensor
    state: dict[str, Tensor]


class AdamW(torch.optim.AdamW):
    """AdamW whose step scales the gradients, and can keep float32 masters of the weights.

    On a GPU, a kernel of tokenyard-kernels-triton updates all parameters in one pass, if that
    package is installed. Otherwise torch's fused AdamW does. Does not import torch's compiler,
    which takes seconds.
    """

    _kernel: FusedAdamW | None = None
    _kernel_chosen = False

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
        """Return the step count and moments of a parameter, zero before its first step."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in MOMENTS:
                state[name] = torch.zeros_like(parameter.detach())
        return state

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: None = None, scale: Tensor | None = None
    ) -> None:
        """Update every parameter that has a gradient. `closure` must be None.

        `scale` is a scalar that multiplies all gradients. If it is not finite, nothing changes.
        With the kernel, the host does not wait for it.
        """
        parameters = self._parameters()
        if not self._kernel_chosen:
            self._kernel_chosen = True
            self._kernel = self._build_kernel(parameters)
        if scale is None:
            scale = torch.ones((), device=parameters[0].device)
        if self._kernel is None:
            self._step_without_kernel(parameters, scale)
            return
        from tokenyard_kernels_triton.optimizer import AdamWSettings

        group = self.param_groups[0]
        settings = AdamWSettings(group["lr"], group["betas"], group["eps"], group["weight_decay"])
        gradients = [None if p.grad is None else local_part(p.grad) for p in parameters]
        self._kernel.step(gradients, scale.float(), settings)

    def _parameters(self) -> list[Tensor]:
        return list(self.param_groups[0]["params"])

    def _step_without_kernel(self, parameters: Sequence[Tensor], scale: Tensor) -> None:
        if not scale.isfinite():
            return
        updates = [
            _Update(
                weight=local_part(parameter.detach()),
                master=local_part(self.master_of(parameter)),
                gradient=local_part(parameter.grad),
                state=self.state_of(parameter),
            )
            for parameter in parameters
            if parameter.grad is not None and local_part(parameter).numel() > 0
        ]
        if not updates:
            return
        masters = [update.master for update in updates]
        gradients = [update.gradient.to(update.master.dtype) for update in updates]
        if scale != 1:
            torch._foreach_mul_(gradients, scale)
        fused_adamw(masters, gradients, [update.state for update in updates], self.param_groups[0])
        if "master" in updates[0].state:
            torch._foreach_copy_([update.weight for update in updates], masters)

    def _build_kernel(self, parameters: Sequence[Tensor]) -> FusedAdamW | None:
        """Return the kernel, if it is installed and supports all tensors."""
        if parameters[0].device.type != "cuda" or None in map(find_spec, _KERNELS):
            return None
        from tokenyard_kernels_triton.optimizer import AdamWTensors, FusedAdamW, supports

        rows = []
        for parameter in parameters:
            state = self.state_of(parameter)
            weight = local_part(parameter.detach())
            master = local_part(state["master"]) if "master" in state else weight
            rows.append(AdamWTensors(weight, master, *(local_part(state[m]) for m in MOMENTS)))
        if not supports(rows):
            return None
        steps = torch.stack([self.state_of(parameter)["step"] for parameter in parameters])
        for parameter, step in zip(parameters, steps):
            self.state_of(parameter)["step"] = step  # a view: the kernel counts all at once
        return FusedAdamW(rows, steps)


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> AdamW:
    """Return AdamW over all trainable parameters. All of them decay, as in Composer.

    `decoupled_adamw` (Loshchilov and Hutter 2017, arXiv 1711.05101, as in Composer) shrinks
    weights by lr / initial lr * weight_decay a step. torch's AdamW shrinks them by
    lr * weight_decay, so its weight_decay is divided by the initial lr.
    """
    decay = config.weight_decay
    if config.name == "decoupled_adamw":
        decay /= config.lr
    keep_compiler_out_of_optimizers()
    return AdamW(
        trainable(model).values(),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=decay,
        fused=True,
    )
