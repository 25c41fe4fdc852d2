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

from tokenyard_train.engine.moments import new_moment, read_moment, write_moment
from tokenyard_train.engine.update_rule import ParameterState
from tokenyard_train.engine.whole_matrices import on_whole_matrices

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan et al., and of ``torch.optim.Muon``
_EPS = 1e-7
_MOMENTUM = "momentum_buffer"
_PORTION_NUMEL = 1 << 27  # numbers of the weights whose updates exist at a time
_BATCH_NUMEL = 1 << 26  # numbers of the matrices that are orthogonalised at a time


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
        for some in _portions([one for one in parameters if one.gradient is not None]):
            directions = on_whole_matrices(
                [one.parameter for one in some],
                [self._update(one, scale) for one in some],
                self._directions,
            )
            masters = [one.master for one in some]
            changes = [direction.to(m.dtype) for direction, m in zip(directions, masters)]
            torch._foreach_mul_(masters, (1 - rate * self.weight_decay).to(masters[0].dtype))
            torch._foreach_mul_(changes, rate.to(masters[0].dtype))
            torch._foreach_sub_(masters, changes)
            if "master" in some[0].state:
                torch._foreach_copy_([one.weight for one in some], masters)

    def _update(self, one: ParameterState, scale: Tensor) -> Tensor:
        """Move the momentum towards the gradient; return Nesterov's update, to orthogonalise.

        If the scale is not finite, the momentum stays as it is.
        """
        momentum = read_moment(one.state, _MOMENTUM)
        assert one.gradient is not None
        gradient = one.gradient.to(momentum.dtype) * scale.to(momentum.dtype)
        gradient = torch.where(scale.isfinite(), gradient, momentum)
        momentum.lerp_(gradient, 1 - self.momentum)
        write_moment(one.state, _MOMENTUM, momentum, scale.isfinite())
        return gradient.lerp(momentum, self.momentum).to(_compute_dtype(momentum))

    def _directions(self, parameters: Sequence[Tensor], stacks: Sequence[Tensor]) -> list[Tensor]:
        """Orthogonalise the matrices of stacks [B, R, C], and scale them by their size."""
        rows = [self.fused_rows.get(p, (p.shape[-2],)) for p in parameters]
        pieces = [piece for x, sizes in zip(stacks, rows) for piece in x.split(sizes, dim=1)]
        done = iter(_orthogonalize(pieces, self.ns_steps))
        return [torch.cat([self._scaled(next(done)) for _ in sizes], dim=1) for sizes in rows]

    def _scaled(self, x: Tensor) -> Tensor:
        """Multiply matrices [B, R, C] by what `adjust_lr` says of their size."""
        rows, columns = x.shape[-2:]
        if self.adjust_lr == "match_rms_adamw":
            return x * (0.2 * math.sqrt(max(rows, columns)))
        return x * math.sqrt(max(1, rows / columns))


def newton_schulz(x: Tensor, steps: int) -> Tensor:
    """Return roughly the nearest matrices to x [B, R, C] whose singular values are 1.

    This is the quintic iteration of Jordan et al., in the dtype of x. It brings singular values
    to between 0.7 and 1.2.
    """
    a, b, c = _COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _orthogonalize(stacks: Sequence[Tensor], steps: int) -> list[Tensor]:
    """Orthogonalise stacks of matrices; those of one size in batches."""
    by_shape: dict[torch.Size, list[int]] = {}
    for index, stack in enumerate(stacks):
        by_shape.setdefault(stack.shape[-2:], []).append(index)
    results = list(stacks)
    for (rows, columns), indices in by_shape.items():
        batch = torch.cat([stacks[i] for i in indices])
        most = max(1, _BATCH_NUMEL // (rows * columns))
        done = torch.cat([newton_schulz(part, steps) for part in batch.split(most)])
        for index, result in zip(indices, done.split([len(stacks[i]) for i in indices])):
            results[index] = result
    return results


def _compute_dtype(momentum: Tensor) -> torch.dtype:
    """Return the dtype of the iteration: on a GPU bfloat16, as Jordan et al. do.

    On a CPU, where bfloat16 is not faster, it is that of the momentum.
    """
    if momentum.is_cuda and momentum.dtype == torch.float32:
        return torch.bfloat16
    return momentum.dtype


def _portions(parameters: Sequence[ParameterState]) -> Iterator[list[ParameterState]]:
    """Split parameters into portions of about `_PORTION_NUMEL` numbers, the same on all ranks."""
    portion: list[ParameterState] = []
    for one in parameters:
        if portion and sum(p.parameter.numel() for p in portion) >= _PORTION_NUMEL:
            yield portion
            portion = []
        portion.append(one)
    if portion:
        yield portion
