"""How the tokens of a step were routed, layer by layer.

A step's numbers are packed on the device and fetched together: one device-to-host copy, however many layers there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokenyard import Balance, load_balancing_loss, z_loss
from tokenyard.losses import Convention


class Fetched(NamedTuple):
    """A step's numbers on the host, in float64."""

    loss: float
    grad_norm: float
    balances: list[Balance]  # one per MoE layer, summed over microbatches and ranks
    flags: list[bool]  # which of them some rank raised


class LayerRouting(NamedTuple):
    """One MoE layer's routing in one step."""

    entropy: float  # of the load, over that of a uniform one: 1 when all experts get the same, 0 when one gets all
    busiest: float  # the largest load, as a multiple of the mean
    idle: int  # experts without a token
    dropped: float  # share of the slots
    balance_loss: float  # unweighted
    z_loss: float  # unweighted


def fetch(
    loss: Tensor,
    grad_norm: Tensor,
    balances: Sequence[Balance],
    reduce: Callable[[Tensor], Tensor],
    flags: Sequence[bool] = (),
) -> Fetched:
    """Bring a step's numbers to the host in one copy.

    `loss`, `grad_norm` and the Balances' `counts` are sums over ranks already; `reduce` adds up the rest, in one call,
    and with it the `flags` that this rank raises.
    """
    packed = pack(loss, grad_norm, balances, reduce, flags).cpu()
    sizes = [balance.counts.numel() for balance in balances]
    values, raised, *layers = packed.split([2, len(flags), *(2 * experts + 2 for experts in sizes)])
    fetched = [_unpacked(layer, experts) for layer, experts in zip(layers, sizes)]
    return Fetched(values[0].item(), values[1].item(), fetched, (raised > 0).tolist())


def pack(
    loss: Tensor,
    grad_norm: Tensor,
    balances: Sequence[Balance],
    reduce: Callable[[Tensor], Tensor],
    flags: Sequence[bool] = (),
) -> Tensor:
    """Return [2 + flags + sum over layers of 2E + 2] float64, still on the device: what `fetch` copies."""
    known = torch.stack((loss.double(), grad_norm.to(loss.device).double()))
    counts = [b.counts.double() for b in balances]
    rest = [
        torch.cat((b.prob_sum.double(), torch.stack((b.z_sum.double(), b.dropped.double()))))
        for b in balances
    ]
    rest = [torch.tensor(list(flags), dtype=torch.float64, device=loss.device), *rest]
    raised, *sums = reduce(torch.cat(rest)).split([part.numel() for part in rest])
    return torch.cat((known, raised, *(part for layer in zip(counts, sums) for part in layer)))


def _unpacked(layer: Tensor, experts: int) -> Balance:
    counts, probabilities, z_sum, dropped = layer.split((experts, experts, 1, 1))
    return Balance(counts, dropped[0], probabilities, z_sum[0])


def routing_stats(
    balances: Sequence[Balance], tokens: int, top_k: int, convention: Convention
) -> list[LayerRouting]:
    """Return each layer's statistics over a step of `tokens` tokens, from Balances on the host."""
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
    """Return each expert's share of a layer's slots, those dropped included."""
    return [float(share) for share in (balance.counts / balance.counts.sum()).tolist()]


def normalised_entropy(load: Sequence[float]) -> float:
    """Return the entropy of shares over that of a uniform load: 1 when all are the same, 0 when one has all."""
    if len(load) == 1:
        return 1.0
    return -sum(share * math.log(share) for share in load if share) / math.log(len(load))
