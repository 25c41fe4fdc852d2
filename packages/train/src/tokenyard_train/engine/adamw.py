"""AdamW, with moments in float32, bfloat16 or 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tokenyard.sharded import local_part
from tokenyard_train.engine.moments import (
    SCALE,
    block_size,
    new_moment,
    read_moment,
    write_moment,
)
from tokenyard_train.engine.update_rule import ParameterState
from tokenyard_train.torch_private import fused_adamw

if TYPE_CHECKING:
    from tokenyard_kernels_triton.optimizer import AdamWTensors, FusedAdamW

MOMENTS = ("exp_avg", "exp_avg_sq")
_KERNELS = ("triton", "tokenyard_kernels_triton")  # modules of the kernel


class AdamW:
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) with the arguments of torch's.

    `moments` is their storage: fp32, bf16 or 8bit. On a GPU, a kernel of tokenyard-kernels-triton
    updates all parameters in one pass, if that package is installed. Otherwise torch's fused AdamW
    does.
    """

    def __init__(
        self, betas: tuple[float, float], eps: float, weight_decay: float, moments: str = "fp32"
    ):
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.moments = moments
        self._kernels: list[_Kernel] | None = None

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return a step count and moments of zero."""
        state = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}
        for name in MOMENTS:
            state |= new_moment(name, parameter, self.moments)
        return state

    def step(self, parameters: Sequence[ParameterState], lr: float, scale: Tensor) -> None:
        """Update the parameters. With the kernel, the host does not wait for the scale."""
        if self._kernels is None:
            self._kernels = _build_kernels(parameters)
        if not self._kernels:
            self._step_without_kernel(parameters, lr, scale)
            return
        from tokenyard_kernels_triton.optimizer import AdamWSettings

        settings = AdamWSettings(lr, self.betas, self.eps, self.weight_decay)
        for kernel, indices in self._kernels:
            kernel.step([parameters[i].gradient for i in indices], scale.float(), settings)

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
        # All at once, or one by one, so that one parameter at a time has moments in float32
        size = len(updated) if self.moments == "fp32" else 1
        for i in range(0, len(updated), size):
            some = slice(i, i + size)
            self._update(updated[some], masters[some], gradients[some], lr)
        if "master" in updated[0].state:
            torch._foreach_copy_([one.weight for one in updated], masters)

    def _update(
        self,
        parameters: Sequence[ParameterState],
        masters: list[Tensor],
        gradients: list[Tensor],
        lr: float,
    ) -> None:
        states = []
        for one, master in zip(parameters, masters):
            moments = {name: read_moment(one.state, name).to(master.dtype) for name in MOMENTS}
            states.append({"step": one.state["step"]} | moments)
        fused_adamw(
            masters,
            gradients,
            states,
            lr=lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )
        for one, state in zip(parameters, states):
            for name in MOMENTS:
                write_moment(one.state, name, state[name])


class _Kernel(NamedTuple):
    """The kernel of some parameters, and their indices."""

    kernel: FusedAdamW
    indices: list[int]


def _build_kernels(parameters: Sequence[ParameterState]) -> list[_Kernel]:
    """Return a kernel for each kind of moments; none if it does not support all tensors."""
    if parameters[0].weight.device.type != "cuda" or None in map(find_spec, _KERNELS):
        return []
    from tokenyard_kernels_triton.optimizer import FusedAdamW, supports

    by_kind: dict[int | None, list[int]] = {}
    for index, one in enumerate(parameters):
        has_scales = MOMENTS[0] + SCALE in one.state
        kind = block_size(one.parameter) if has_scales else None
        by_kind.setdefault(kind, []).append(index)
    rows = {kind: [_tensors(parameters[i]) for i in indices] for kind, indices in by_kind.items()}
    if not all(map(supports, rows.values())):
        return []
    kernels = []
    for kind, indices in by_kind.items():
        states = [parameters[i].state for i in indices]
        steps = torch.stack([state["step"] for state in states])
        for state, step in zip(states, steps):
            state["step"] = step  # a view: the kernel counts all at once
        kernels.append(_Kernel(FusedAdamW(rows[kind], steps), indices))
    return kernels


def _tensors(one: ParameterState) -> AdamWTensors:
    from tokenyard_kernels_triton.optimizer import AdamWTensors

    weight = one.weight
    master = one.master if "master" in one.state else weight
    names = [*MOMENTS, *(name + SCALE for name in MOMENTS)]
    moments = [local_part(one.state[name]) for name in names if name in one.state]
    return AdamWTensors(weight, master, *moments)
