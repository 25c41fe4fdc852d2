"""Routing statistics of a training step, per MoE layer."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tokenyard import Balance
from tokenyard.losses import Convention, layer_balancing_losses


class LayerRouting(NamedTuple):
    """One MoE layer's routing in one step."""

    entropy: float  # normalised entropy of the load: 1 is uniform, 0 is all slots on one expert
    busiest: float  # the largest load, as a multiple of the mean
    idle: int  # experts without a token
    dropped: float  # dropped share of the slots
    balance_loss: float  # unweighted
    z_loss: float  # unweighted


def routing_stats(
    balance: Balance, tokens: int, top_k: int, convention: Convention
) -> list[LayerRouting]:
    """Return each layer's statistics from a Balance of all layers on the host.

    `tokens` is the step's count. A GPU waits meanwhile, so all layers are computed together.
    """
    counts, dropped, prob_sums, z_sums = balance
    loads = loads_of(balance)
    columns = (
        normalised_entropy(loads),
        loads.amax(1) * loads.shape[1],
        (loads == 0).sum(1),
        dropped / counts.sum(1),
        layer_balancing_losses(counts, prob_sums, tokens, top_k, convention),
        z_sums / tokens,
    )
    return [LayerRouting(*row) for row in zip(*(column.tolist() for column in columns))]


def loads_of(balance: Balance) -> Tensor:
    """Return each expert's share [L, E] of its layer's slots, dropped slots included."""
    return balance.counts / balance.counts.sum(1, keepdim=True)


def normalised_entropy(loads: Tensor) -> Tensor:
    """Return the entropy [...] of shares [..., E], divided by that of a uniform load.

    1 means that all shares are equal, 0 that one expert has everything.
    """
    experts = loads.shape[-1]
    if experts == 1:
        return loads.new_ones(loads.shape[:-1])
    return -torch.xlogy(loads, loads).sum(-1) / math.log(experts)
