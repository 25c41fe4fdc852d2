"""Muon: momentum, orthogonalised, for weights that are matrices.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". With the scale of Liu
et al. 2025 (arXiv 2502.16982), updates are as large as AdamW's, so both rules can have one rate and
decay.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tokenyard.sharded import local_part
from tokenyard_train.engine.moments import new_moment, read_moment, write_moment
from tokenyard_train.engine.newton_schulz import has_kernels, orthogonalize_
from tokenyard_train.engine.update_rule import ParameterState
from tokenyard_train.engine.whole_matrices import on_whole_matrices

_MOMENTUM = "momentum_buffer"
_PORTION_NUMEL = 1 << 27  # numbers of the weights whose updates exist at a time


class Muon:
    """Muon with the arguments of ``torch.optim.Muon``, with which it agrees matrix by matrix.

    Packed experts [E, rows, columns] are E matrices, or E for each of their `fused_rows`: the gate
    and up projections of an expert, and the queries, keys and values of a layer, are orthogonalised
    one by one, as Jordan et al. do. They are different maps, so a direction that is weak in one
    should not be hidden by another. `fused_rows` has the rows of each by parameter.
    """

    def __init__(
        self,
        momentum: float,
        weight_decay: float,
        ns_steps: int,
        adjust_lr: str,
        fused_rows: Mapping[Tensor, tuple[int, ...]],
        moments: str = "fp32",
    ):
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.ns_steps = ns_steps
        self.adjust_lr = adjust_lr
        self.fused_rows = fused_rows
        self.moments = moments

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return a momentum of zero."""
        return new_moment(_MOMENTUM, parameter, self.moments)

    def step(self, parameters: Sequence[ParameterState], lr: float, scale: Tensor) -> None:
        """Update the parameters. The host does not wait for the scale."""
        rate = scale.isfinite().double() * lr
        with_gradient = [one for one in parameters if one.gradient is not None]
        for some in _portions(sorted(with_gradient, key=lambda one: one.parameter.numel())):
            directions = on_whole_matrices(
                [one.parameter for one in some],
                [self._update(one, scale) for one in some],
                self._orthogonalize,
            )
            for one, direction in zip(some, directions):
                self._descend(one, direction, rate)

    def _update(self, one: ParameterState, scale: Tensor) -> Tensor:
        """Move the momentum towards the gradient; return Nesterov's update, to orthogonalise.

        If the scale is not finite, the momentum stays as it is. The update is in the dtype of the
        momentum, but on a GPU in bfloat16, as that of Jordan et al.
        """
        gradient = one.gradient
        assert gradient is not None
        stored = local_part(one.state[_MOMENTUM])
        if _have_kernel(gradient, stored):
            from tokenyard_kernels_triton.optimizer.muon import nesterov

            return nesterov(gradient, stored, scale, self.momentum)
        momentum = read_moment(one.state, _MOMENTUM)
        gradient = gradient.to(momentum.dtype) * scale.to(momentum.dtype)
        gradient = torch.where(scale.isfinite(), gradient, momentum)
        momentum.lerp_(gradient, 1 - self.momentum)
        write_moment(one.state, _MOMENTUM, momentum, scale.isfinite())
        update = gradient.lerp(momentum, self.momentum)
        return update.bfloat16() if update.is_cuda and update.dtype == torch.float32 else update

    def _orthogonalize(
        self, parameters: Sequence[Tensor], stacks: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Orthogonalise the matrices of stacks [B, R, C] in place, scaled by their size."""
        rows = [self.fused_rows.get(p, (p.shape[-2],)) for p in parameters]
        pieces = [piece for x, sizes in zip(stacks, rows) for piece in _pieces(x, sizes)]
        orthogonalize_(pieces, self.ns_steps, self._factor)
        return stacks

    def _factor(self, rows: int, columns: int) -> float:
        """Return what `adjust_lr` says of the size of a matrix."""
        if self.adjust_lr == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        return math.sqrt(max(1, rows / columns))

    def _descend(self, one: ParameterState, direction: Tensor, rate: Tensor) -> None:
        """Decay a weight and its master, and subtract rate * direction."""
        master = one.master
        weight = one.weight if "master" in one.state else master
        decay = (1 - rate * self.weight_decay).to(master.dtype)
        rate = rate.to(master.dtype)
        if _have_kernel(master, weight, direction):
            from tokenyard_kernels_triton.optimizer.muon import descend

            descend(master, weight, direction, rate, decay)
            return
        master.mul_(decay).sub_(direction.to(master.dtype).mul_(rate))
        if weight is not master:
            weight.copy_(master)


def _pieces(stack: Tensor, rows: Sequence[int]) -> Sequence[Tensor]:
    """Return views [B, R', C] of a stack [B, R, C] of matrices with `rows` that follow each other.

    Matrices of one size are one view [B * len(rows), R', C].
    """
    if len(set(rows)) == 1 and stack.is_contiguous():
        return [stack.view(-1, rows[0], stack.shape[2])]
    return stack.split(list(rows), dim=1)


def _have_kernel(*tensors: Tensor) -> bool:
    """Return whether a kernel computes with such tensors in one pass."""
    if not tensors[0].is_cuda or not has_kernels():
        return False
    from tokenyard_kernels_triton.optimizer.muon import supports

    return supports(*tensors)


def _portions(parameters: Sequence[ParameterState]) -> Iterator[list[ParameterState]]:
    """Split parameters into portions of about `_PORTION_NUMEL` numbers, the same on all ranks.

    Small matrices of one size are computed together if they are in one portion.
    """
    portion: list[ParameterState] = []
    for one in parameters:
        if portion and sum(p.parameter.numel() for p in portion) >= _PORTION_NUMEL:
            yield portion
            portion = []
        portion.append(one)
    if portion:
        yield portion
