"""Routing statistics of a training step, per MoE layer.

A step's numbers are packed on the device and fetched by one device-to-host copy for all layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokenyard import Balance, load_balancing_loss, z_loss
from tokenyard.losses import Convention


class StepNumbers(NamedTuple):
    """A step's numbers on the host, in float64."""

    loss: float
    grad_norm: float
    balances: list[Balance]  # one per MoE layer, summed over microbatches and ranks
    flags: list[bool]  # each one set if any rank set it
    counts: list[int]  # the numbers of tokens that were given


class LayerRouting(NamedTuple):
    """One MoE layer's routing in one step."""

    entropy: float  # normalised entropy of the load: 1 is uniform, 0 is all slots on one expert
    busiest: float  # the largest load, as a multiple of the mean
    idle: int  # experts without a token
    dropped: float  # dropped share of the slots
    balance_loss: float  # unweighted
    z_loss: float  # unweighted


def fetch(
    loss: Tensor,
    grad_norm: Tensor,
    balances: Sequence[Balance],
    reduce: Callable[[Tensor], Tensor],
    flags: Sequence[bool] = (),
    counts: Sequence[Tensor | int] = (),
) -> StepNumbers:
    """Copy a step's numbers to the host in one transfer.

    `loss`, `grad_norm`, the Balances' `counts` and the `counts` of tokens are already sums over
    ranks. One call of `reduce` sums the rest over ranks, together with this rank's `flags`.
    """
    packed = pack(loss, grad_norm, balances, reduce, flags, counts).cpu()
    sizes = [balance.counts.numel() for balance in balances]
    scalars, flag_sums, *layers = packed.split(
        [2 + len(counts), len(flags), *(2 * experts + 2 for experts in sizes)]
    )
    summed = [_unpack(layer, experts) for layer, experts in zip(layers, sizes)]
    loss_sum, norm, *tokens = scalars.tolist()
    return StepNumbers(loss_sum, norm, summed, (flag_sums > 0).tolist(), [int(n) for n in tokens])


def pack(
    loss: Tensor,
    grad_norm: Tensor,
    balances: Sequence[Balance],
    reduce: Callable[[Tensor], Tensor],
    flags: Sequence[bool] = (),
    counts: Sequence[Tensor | int] = (),
) -> Tensor:
    """Pack a step's numbers on the device, for `fetch` to copy.

    Returns [2 + counts + flags + sum over layers of (2E + 2)] float64: loss, gradient norm, counts
    of tokens, flags, and per layer counts [E], summed probabilities [E], z sum and dropped slots.
    """
    tokens = [loss.new_zeros((), dtype=torch.float64) + count for count in counts]
    scalars = torch.stack((loss.double(), grad_norm.to(loss.device).double(), *tokens))
    slots = [b.counts.double() for b in balances]
    local = [
        torch.cat((b.prob_sum.double(), torch.stack((b.z_sum.double(), b.dropped.double()))))
        for b in balances
    ]
    local = [torch.tensor(list(flags), dtype=torch.float64, device=loss.device), *local]
    flag_sums, *sums = reduce(torch.cat(local)).split([part.numel() for part in local])
    return torch.cat((scalars, flag_sums, *(part for layer in zip(slots, sums) for part in layer)))


def _unpack(layer: Tensor, experts: int) -> Balance:
    counts, probabilities, z_sum, dropped = layer.split((experts, experts, 1, 1))
    return Balance(counts, dropped[0], probabilities, z_sum[0])


def routing_stats(
    balances: Sequence[Balance], tokens: int, top_k: int, convention: Convention
) -> list[LayerRouting]:
    """Return each layer's statistics from its Balance on the host. `tokens` is the step's count."""
    return [
        LayerRouting(
            entropy=normalised_entropy(load := load_of(balance)),
            busiest=max(load) * len(load),
            idle=load.count(0.0),
            dropped=(balance.dropped / balance.counts.sum()).item(),
            balance_loss=load_balancing_loss([balance], tokens, top_k, convention).item(),
            z_loss=z_loss([balance], tokens).item(),
        )
        for balance in balances
    ]


def load_of(balance: Balance) -> list[float]:
    """Return each expert's share of a layer's slots, dropped slots included."""
    return [float(share) for share in (balance.counts / balance.counts.sum()).tolist()]


def normalised_entropy(load: Sequence[float]) -> float:
    """Return the entropy of the shares divided by that of a uniform load.

    1 means that all shares are equal, 0 that one expert has everything.
    """
    if len(load) == 1:
        return 1.0
    return -sum(share * math.log(share) for share in load if share) / math.log(len(load))
