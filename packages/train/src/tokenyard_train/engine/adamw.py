"""AdamW, with float32 masters of weights that are stored in bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenyard.sharded import local_part
from tokenyard_train.engine.update_rule import ParameterState
from tokenyard_train.torch_private import fused_adamw

if TYPE_CHECKING:
    from tokenyard_kernels_triton.optimizer import FusedAdamW

MOMENTS = ("exp_avg", "exp_avg_sq")
_KERNELS = ("triton", "tokenyard_kernels_triton")  # modules of the kernel


class AdamW:
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) with the arguments of torch's.

    On a GPU, a kernel of tokenyard-kernels-triton updates all parameters in one pass, if that
    package is installed. Otherwise torch's fused AdamW does.
    """

    def __init__(self, betas: tuple[float, float], eps: float, weight_decay: float):
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self._kernel: FusedAdamW | None = None
        self._kernel_chosen = False

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return a step count and moments of zero."""
        state = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}
        return state | {name: torch.zeros_like(parameter.detach()) for name in MOMENTS}

    def step(self, parameters: Sequence[ParameterState], lr: float, scale: Tensor) -> None:
        """Update the parameters. With the kernel, the host does not wait for the scale."""
        if not self._kernel_chosen:
            self._kernel_chosen = True
            self._kernel = _build_kernel(parameters)
        if self._kernel is None:
            self._step_without_kernel(parameters, lr, scale)
            return
        from tokenyard_kernels_triton.optimizer import AdamWSettings

        settings = AdamWSettings(lr, self.betas, self.eps, self.weight_decay)
        self._kernel.step([one.gradient for one in parameters], scale.float(), settings)

    def _step_without_kernel(
        self, parameters: Sequence[ParameterState], lr: float, scale: Tensor
    ) -> None:
        with_gradient = [
            (one, one.gradient.to(one.master.dtype))
            for one in parameters
            if one.gradient is not None and one.weight.numel() > 0
        ]
        if not with_gradient or not scale.isfinite():
            return
        updated = [one for one, _ in with_gradient]
        gradients = [gradient for _, gradient in with_gradient]
        masters = [one.master for one in updated]
        if scale != 1:
            torch._foreach_mul_(gradients, scale)
        fused_adamw(
            masters,
            gradients,
            [one.state for one in updated],
            lr=lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )
        if "master" in updated[0].state:
            torch._foreach_copy_([one.weight for one in updated], masters)


def _build_kernel(parameters: Sequence[ParameterState]) -> FusedAdamW | None:
    """Return the kernel, if it is installed and supports all tensors."""
    if parameters[0].weight.device.type != "cuda" or None in map(find_spec, _KERNELS):
        return None
    from tokenyard_kernels_triton.optimizer import AdamWTensors, FusedAdamW, supports

    rows = []
    for one in parameters:
        weight = one.weight
        master = one.master if "master" in one.state else weight
        rows.append(AdamWTensors(weight, master, *(local_part(one.state[m]) for m in MOMENTS)))
    if not supports(rows):
        return None
    steps = torch.stack([one.state["step"] for one in parameters])
    for one, step in zip(parameters, steps):
        one.state["step"] = step  # a view: the kernel counts all at once
    return FusedAdamW(rows, steps)
