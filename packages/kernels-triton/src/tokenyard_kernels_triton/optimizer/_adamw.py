"""AdamW in one pass over memory: clipping, moments, float32 master and 16-bit weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from tokenyard_kernels_triton._device import on_device_of
from tokenyard_kernels_triton.kernels._adamw import adamw
from tokenyard_kernels_triton.kernels._adamw_steps import count_steps

_BLOCK = 2048  # elements of a program
_STEPS = 128  # parameters of a program that counts steps

_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
}


class AdamWTensors(NamedTuple):
    """The tensors of one parameter, contiguous and, but for the scales, of one size."""

    weight: Tensor
    master: Tensor  # float32; the weight itself if that is float32
    exp_avg: Tensor  # codes, uint8, if there are scales
    exp_avg_sq: Tensor
    exp_avg_scale: Tensor | None = None  # float32, one for each block of moments in 8 bits
    exp_avg_sq_scale: Tensor | None = None

    @property
    def scaled(self) -> int:
        """How many moments in 8 bits have a scale; 0 without scales."""
        if self.exp_avg_scale is None or not self.exp_avg_scale.numel():
            return 0
        return self.exp_avg.numel() // self.exp_avg_scale.numel()


class AdamWSettings(NamedTuple):
    """The numbers of a step, as in ``torch.optim.AdamW``."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def supports(parameters: Sequence[AdamWTensors]) -> bool:
    """Return whether `FusedAdamW` supports parameters.

    Their tensors must be contiguous and on a GPU; all weights must have one of its dtypes, and so
    must all masters and all moments. Moments in 8 bits need scales of blocks of one size, a power
    of two.
    """
    weights, masters, *moments = (list(column) for column in zip(*parameters))
    kinds = (weights, masters, moments[0] + moments[1])
    sizes = {p.scaled for p in parameters if p.weight.numel()}
    eight_bits = moments[0][0].dtype == torch.uint8
    if len(sizes) > 1 or any((size > 0) != eight_bits or size & (size - 1) for size in sizes):
        return False
    scales = [scale for column in moments[2:] for scale in column if scale is not None]
    return all(scale.is_contiguous() for scale in scales) and all(
        len({tensor.dtype for tensor in kind}) == 1
        and kind[0].dtype in _DTYPES
        and all(tensor.is_cuda and tensor.is_contiguous() for tensor in kind)
        for kind in kinds
    )


class FusedAdamW:
    """Updates parameters by AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) in one launch.

    Reads each gradient once, and reads and writes each master and moment once. `steps` [parameters]
    is float32 and counts the steps of each parameter. `supports` says which parameters it takes.
    """

    def __init__(self, parameters: Sequence[AdamWTensors], steps: Tensor):
        self.parameters = list(parameters)
        self.steps = steps
        self.scaled = max((p.scaled for p in self.parameters), default=0)
        device = steps.device
        sizes = torch.tensor([p.weight.numel() for p in self.parameters])
        blocks = (sizes + _BLOCK - 1) // _BLOCK
        tensor = torch.arange(len(sizes)).repeat_interleave(blocks)
        first_block = blocks.cumsum(0) - blocks
        index = torch.arange(len(tensor)) - first_block[tensor]
        self._sizes = sizes.to(device)
        self._block_tensor = tensor.int().to(device)
        self._block_index = index.int().to(device)
        self._fixed = torch.tensor([_addresses(p) for p in self.parameters], dtype=torch.int64)
        self._gradients: list[int] = []  # their addresses in the table
        self._aligned = False
        self._table = torch.empty(0, dtype=torch.int64, device=device)
        self._has_gradient = torch.empty(0, device=device)
        self._step_sizes = torch.empty_like(steps)
        self._corrections = torch.empty_like(steps)

    @torch.no_grad()
    def step(
        self, gradients: Sequence[Tensor | None], scale: Tensor, settings: AdamWSettings
    ) -> None:
        """Update all parameters that have a gradient; gradients have one dtype and are contiguous.

        `scale`, a float32 scalar, multiplies the gradients. If it is not finite, nothing changes.
        Does not wait for the GPU.
        """
        dtype = _common_dtype(gradients)
        if dtype is None:
            return
        self._write_table(gradients)
        self._count_step(scale, settings)
        beta1, beta2 = settings.betas
        first = self.parameters[0]
        with on_device_of(self.steps):
            adamw[(len(self._block_tensor),)](
                self._table,
                self._sizes,
                self._block_tensor,
                self._block_index,
                self._step_sizes,
                self._corrections,
                scale,
                1 - settings.lr * settings.weight_decay,
                beta1,
                beta2,
                settings.eps,
                WEIGHT=_DTYPES[first.weight.dtype],
                GRADIENT=_DTYPES[dtype],
                MASTER=_DTYPES[first.master.dtype],
                MOMENT=_DTYPES[first.exp_avg.dtype],
                HAS_MASTER=first.master is not first.weight,
                ALIGNED=self._aligned,
                BLOCK=_BLOCK,
                SCALED=self.scaled,
                num_warps=8,
            )

    def _count_step(self, scale: Tensor, settings: AdamWSettings) -> None:
        """Count a step, and a version of each weight: the kernel writes by addresses only."""
        count = len(self.steps)
        with on_device_of(self.steps):
            count_steps[(-(-count // _STEPS),)](
                self.steps,
                self._has_gradient,
                scale,
                self._step_sizes,
                self._corrections,
                count,
                settings.lr,
                *(math.log(beta) if beta else -math.inf for beta in settings.betas),
                BLOCK=_STEPS,
            )
        increment_version([parameter.weight for parameter in self.parameters])

    def _write_table(self, gradients: Sequence[Tensor | None]) -> None:
        """Copy the addresses to the GPU, unless gradients are where they were in the last step."""
        addresses = [0 if gradient is None else gradient.data_ptr() for gradient in gradients]
        if addresses == self._gradients:
            return
        device = self.steps.device
        self._gradients = addresses
        column = torch.tensor(addresses, dtype=torch.int64).unsqueeze(1)
        table = torch.cat((self._fixed[:, :1], column, self._fixed[:, 1:]), 1)
        self._aligned = not (table % 16).any()
        self._table = table.to(device, non_blocking=True)
        present = [float(gradient is not None) for gradient in gradients]
        self._has_gradient = torch.tensor(present).to(device, non_blocking=True)


def _addresses(parameter: AdamWTensors) -> list[int]:
    """Return the addresses of a parameter's tensors, which never move; 0 for a missing scale."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in parameter]


def _common_dtype(gradients: Sequence[Tensor | None]) -> torch.dtype | None:
    """Return the dtype of the gradients, None without any. Raises ValueError for several."""
    dtypes = {gradient.dtype for gradient in gradients if gradient is not None}
    if len(dtypes) > 1:
        raise ValueError(f"gradients have several dtypes: {', '.join(sorted(map(str, dtypes)))}")
    return dtypes.pop() if dtypes else None
