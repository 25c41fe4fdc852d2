"""The numbers of a training step, on their way from the device to the host.

They are packed on the device. One copy brings those of all layers, while the device runs the next
step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokenyard import Balance


class StepNumbers(NamedTuple):
    """A step's numbers on the host, in float64."""

    loss: float
    grad_norm: float
    balance: Balance | None  # [L, ...] of all MoE layers, summed over microbatches and ranks
    flags: list[bool]  # each one set if any rank set it
    counts: list[int]  # the numbers of tokens that were given


class LayerSums(NamedTuple):
    """The Balances of all MoE layers in two tensors, so that a step launches few kernels for them.

    It is a pytree of tensors.
    """

    counts: Tensor  # [sum of E] summed over ranks
    local: Tensor  # [sum of E + 2] float64, of this rank: each layer's prob_sum, z_sum, dropped

    @staticmethod
    def of(balances: Sequence[Balance]) -> LayerSums | None:
        """Pack the Balances of a microbatch, whose `counts` are summed over ranks; None if none."""
        if not balances:
            return None
        local = [
            t for b in balances for t in (b.prob_sum, b.z_sum.unsqueeze(0), b.dropped.unsqueeze(0))
        ]
        counts = torch.cat([balance.counts for balance in balances])
        return LayerSums(counts, torch.cat([tensor.double() for tensor in local]))

    def plus(self, other: LayerSums) -> LayerSums:
        """Return the sums of two microbatches."""
        return LayerSums(self.counts + other.counts, self.local + other.local)


def pack(
    loss: Tensor,
    grad_norm: Tensor,
    sums: LayerSums | None,
    reduce: Callable[[Tensor], Tensor],
    flags: Sequence[bool] = (),
    counts: Sequence[Tensor | int] = (),
) -> Tensor:
    """Pack a step's numbers on the device, for `Fetch` to copy. No host sync.

    `loss`, `grad_norm`, the `counts` of `sums` and the `counts` of tokens are already sums over
    ranks. One call of `reduce` sums the rest over ranks, together with this rank's `flags`.
    Returns float64: loss, gradient norm, those counts of tokens that are tensors, flags, then per
    layer the summed probabilities [E], z sum and dropped slots, then the slots of all experts.
    """
    tokens = [count for count in counts if isinstance(count, Tensor)]
    scalars = [loss, grad_norm.to(loss.device), *tokens]
    # A list would be copied to the device, and the host would wait for that
    local = [loss.new_full((1,), float(flag), dtype=torch.float64) for flag in flags]
    if sums is not None:
        local.append(sums.local)
    parts = [scalar.double().unsqueeze(0) for scalar in scalars]
    if local:
        parts.append(reduce(torch.cat(local)))
    if sums is not None:
        parts.append(sums.counts.double())
    return torch.cat(parts)


class Fetch:
    """The copy of a step's numbers to the host, in one transfer. The host waits in `wait` only.

    `experts` is the number E for each MoE layer. The rest is the result and arguments of `pack`.
    """

    def __init__(
        self,
        packed: Tensor,
        experts: Sequence[int],
        flags: Sequence[bool] = (),
        counts: Sequence[Tensor | int] = (),
    ):
        self.layers = len(experts)
        self.experts = experts[0] if experts else 0
        self.flags = len(flags)
        self.counts = list(counts)
        self._numbers, self._arrived = _begin_copy(packed)

    def wait(self) -> StepNumbers:
        """Return the numbers when they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        on_device = sum(isinstance(count, Tensor) for count in self.counts)
        loss, norm, *summed = self._numbers[: 2 + on_device].tolist()
        slots = self.layers * self.experts
        flag_sums, local, counts = self._numbers[2 + on_device :].split(
            [self.flags, slots + 2 * self.layers, slots]
        )
        tokens = [summed.pop(0) if isinstance(count, Tensor) else count for count in self.counts]
        return StepNumbers(
            loss,
            norm,
            self._balance(local, counts) if self.layers else None,
            (flag_sums > 0).tolist(),
            [int(count) for count in tokens],
        )

    def _balance(self, local: Tensor, counts: Tensor) -> Balance:
        prob_sum, z_sum, dropped = local.view(self.layers, -1).split([self.experts, 1, 1], 1)
        return Balance(counts.view(self.layers, -1), dropped[:, 0], prob_sum, z_sum[:, 0])


def _begin_copy(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Begin to copy a tensor to the host. Return the copy, and the event to wait for, if any."""
    if not tensor.is_cuda:
        return tensor, None
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(tensor.device))
    return copy, arrived
