"""Forward and backward over the microbatches of a batch.

The loss is the sum of token losses divided by the supervised tokens of the global batch, for any
number of microbatches and ranks. The auxiliary losses are computed per microbatch, with counts
summed over ranks, and weighted by the microbatch's share of the tokens without padding. The
strategy sums gradients over ranks in the backward pass of each microbatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tokenyard import Balance, Targets, TokenLoss
from tokenyard_train.engine.phases import Phases, untimed
from tokenyard_train.engine.reader import Count, Counts, Work
from tokenyard_train.engine.setup import Setup
from tokenyard_train.records.step_numbers import LayerSums


class Microbatch(NamedTuple):
    """The numbers of a microbatch, without a gradient. It is a pytree of tensors."""

    nats: Tensor  # [] this rank's token losses, divided by the supervised tokens of the batch
    sums: LayerSums | None  # of the MoE layers; None without any


class Accumulated(NamedTuple):
    """The numbers of a batch."""

    loss: Tensor  # [] float64, nats per supervised token, summed over ranks
    sums: LayerSums | None  # of the MoE layers; None without any
    tokens: Count  # over all ranks, without padding
    supervised: Count  # over all ranks; at least 1


def accumulate(setup: Setup, batch: int, phase: Phases = untimed) -> Accumulated:
    """Add the gradients of this rank's microbatches of a batch to ``parameter.grad``.

    Of the LayerSums, only `counts` is summed over ranks here; `pack` sums the rest.
    """
    with phase("data"):
        work = setup.reader.take(batch)
    loss = torch.zeros((), dtype=torch.float64, device=setup.device)
    sums: LayerSums | None = None
    several = len(work) > 1
    with setup.sums.adding() if several else nullcontext():
        for each in work:
            result = _run(setup, each, phase, several)
            if several:
                setup.optimizer.widen_gradients()
            loss += result.nats
            if result.sums is not None:
                sums = result.sums if sums is None else sums.plus(result.sums)
    counts = work[0].counts
    return Accumulated(setup.strategy.reduce(loss), sums, counts.batch, counts.supervised)


def _run(setup: Setup, work: Work, phase: Phases, add: bool) -> Microbatch:
    """Run a microbatch, as a CUDA graph if there is one. With `add`, it adds to gradients."""
    run = partial(run_microbatch, setup)
    if setup.graph is None:
        return run(work, phase)
    with phase("forward and backward"):
        return setup.graph(work, run, add=add)


def run_microbatch(setup: Setup, work: Work, phase: Phases = untimed) -> Microbatch:
    """Run forward and backward over a microbatch."""
    ids, targets, documents = work.batch
    # A model may have no argument `documents`: it is given only where there are any.
    packed = {} if documents is None else {"documents": documents}
    with phase("forward"), setup.precision():
        result: TokenLoss = setup.model(ids, targets=Targets(targets), **packed)
        nats = result.nats / work.counts.supervised
    with phase("backward"):
        balances = _with_all_counts(setup, result.balances)
        (nats + _auxiliary(setup, balances, work.counts)).backward()
    with torch.no_grad():
        return Microbatch(nats.detach(), LayerSums.of(balances))


def _with_all_counts(setup: Setup, balances: Sequence[Balance]) -> list[Balance]:
    """Replace this rank's counts by the sum over ranks, in one collective for all layers."""
    if not balances:
        return []
    counts = [balance.counts for balance in balances]
    summed = setup.strategy.reduce(torch.cat(counts)).split([each.numel() for each in counts])
    return [balance._replace(counts=each) for balance, each in zip(balances, summed)]


def _auxiliary(setup: Setup, balances: list[Balance], counts: Counts) -> Tensor | float:
    """Return the weighted auxiliary losses of a microbatch."""
    if not setup.layers:
        return 0.0
    weighted = setup.model.auxiliary(balances, counts.microbatch, setup.layers[0].workload.top_k)
    return weighted * (counts.microbatch / counts.batch)
