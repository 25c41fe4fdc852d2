"""Forward and backward over the microbatches of a batch.

The loss is the sum of token losses divided by the tokens of the global batch, for any number of
microbatches and ranks. The auxiliary losses are computed per microbatch, with counts summed over
ranks, and weighted by the microbatch's share of the tokens. The strategy sums gradients over ranks
in the backward pass of each microbatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tokenyard import Balance, Targets, TokenLoss, moe_layers
from tokenyard_train.engine.phases import Phases, untimed
from tokenyard_train.engine.setup import Setup


class Microbatch(NamedTuple):
    """The numbers of a microbatch, without a gradient. It is a pytree of tensors."""

    nats: Tensor  # [] this rank's token losses, divided by the tokens of the global batch
    balances: list[Balance]  # one per MoE layer; only `counts` is summed over ranks


def accumulate(setup: Setup, batch: int, phase: Phases = untimed) -> tuple[Tensor, list[Balance]]:
    """Add the gradients of this rank's microbatches of a batch to ``parameter.grad``.

    Return the loss, summed over ranks, and a Balance for each MoE layer, summed over microbatches.
    Of a Balance, only `counts` is summed over ranks here; `fetch` sums the rest.
    """
    config = setup.config
    rank, world = setup.strategy.data
    rows_each = int(config.device_train_microbatch_size)
    with phase("data"):
        samples = setup.data.train.batch(
            batch, config.global_train_batch_size, rank, world, rows_each
        ).to(setup.device)
    loss = torch.zeros((), dtype=torch.float64, device=setup.device)
    balances: list[Balance] = []
    for rows in samples.split(rows_each):  # [B, S + 1]
        run = partial(run_microbatch, setup)
        several = rows.shape[0] < samples.shape[0]
        if setup.graph is None:
            result = run(rows, phase)
        else:
            with phase("forward and backward"):
                result = setup.graph(rows, run, add=several)
        if several:
            setup.optimizer.widen_gradients()
        loss += result.nats
        balances = _sum_balances(balances, result.balances)
    return setup.strategy.reduce(loss), balances


def run_microbatch(setup: Setup, rows: Tensor, phase: Phases = untimed) -> Microbatch:
    """Run forward and backward over rows [B, S + 1] of token ids."""
    with phase("forward"), setup.precision():
        result: TokenLoss = setup.model(rows[:, :-1], targets=Targets(rows[:, 1:]))
        nats = result.nats / setup.batch_tokens
    with phase("backward"):
        balances = _with_all_counts(setup, result.balances)
        tokens = rows.shape[0] * setup.config.max_seq_len * setup.strategy.data[1]
        (nats + _auxiliary(setup, balances, tokens)).backward()
    return Microbatch(nats.detach(), [Balance(*(t.detach() for t in b)) for b in balances])


def _with_all_counts(setup: Setup, balances: Sequence[Balance]) -> list[Balance]:
    """Replace this rank's counts by the sum over ranks, in one collective for all layers."""
    if not balances:
        return []
    counts = [balance.counts for balance in balances]
    summed = setup.strategy.reduce(torch.cat(counts)).split([each.numel() for each in counts])
    return [balance._replace(counts=each) for balance, each in zip(balances, summed)]


def _sum_balances(total: list[Balance], added: list[Balance]) -> list[Balance]:
    """Return the sums of two lists of Balances; an empty list counts as zeros."""
    if not total:
        return added
    return [Balance(*(a + b for a, b in zip(*pair))) for pair in zip(total, added)]


def _auxiliary(setup: Setup, balances: list[Balance], tokens: int) -> Tensor | float:
    """Return the weighted auxiliary losses of a microbatch of `tokens` tokens over all ranks."""
    layers = moe_layers(setup.model)
    if not layers:
        return 0.0
    weighted = setup.model.auxiliary(balances, tokens, layers[0].workload.top_k)
    return weighted * (tokens / setup.batch_tokens)
