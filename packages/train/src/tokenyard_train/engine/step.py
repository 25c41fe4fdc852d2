"""One optimizer step over a global batch.

The loss is the sum of token losses divided by the tokens of the global batch, whatever the microbatches and ranks. The
auxiliary losses are taken per microbatch (counts summed over ranks) and weighted by its share of the tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenyard import Balance, Output, load_balancing_loss, moe_layers, z_loss
from tokenyard_train.engine.nonfinite import Skipped, skipped
from tokenyard_train.engine.optimizer import learning_rate
from tokenyard_train.engine.setup import Run
from tokenyard_train.records.routing import Fetched, fetch, load_of, routing_stats


class StepResult(NamedTuple):
    """What one step was like."""

    loss: float  # nats per token
    balance_loss: float  # unweighted; 0 without experts
    z_loss: float  # unweighted; 0 without experts
    grad_norm: float  # before clipping
    lr: float
    load: list[list[float]]  # per MoE layer, each expert's share of the slots
    dropped: int  # slots
    routing: list[dict[str, float]]  # per MoE layer, the fields of LayerRouting


def train_step(run: Run) -> StepResult | Skipped:
    """Take step ``run.batch``, or say that it was skipped; raises NonFiniteError before anything is changed."""
    config = run.config
    run.model.train()
    lr = learning_rate(
        config.scheduler,
        config.optimizer.lr,
        run.batch,
        run.span(config.scheduler.t_warmup),
        run.span(config.scheduler.t_max),
    )
    _seed(run)
    loss, balances = _accumulate(run)
    with run.phase("optimizer"):
        clipping = config.algorithms.gradient_clipping
        norm = run.strategy.clip(run.model, clipping.clipping_threshold if clipping else math.inf)
        fetched = fetch(loss, norm, balances, run.strategy.reduce, (run.asked, run.saver.failed))
        run.stop, run.unsaved = fetched.flags
        if (instead := skipped(run, fetched.loss, fetched.grad_norm)) is not None:
            run.optimizer.zero_grad(set_to_none=True)
            return instead
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
    for moe, balance in zip(moe_layers(run.model), balances):
        moe.router.update(balance.counts)
    return _result(run, fetched, lr)


def _accumulate(run: Run) -> tuple[Tensor, list[Balance]]:
    """Run forward and backward over this rank's microbatches; return the summed loss and Balances of the batch."""
    config = run.config
    rank, world = run.strategy.data
    size, rows_each = config.global_train_batch_size, int(config.device_train_microbatch_size)
    with run.phase("data"):
        batch = run.data.train.batch(run.batch, size, rank, world, rows_each).to(run.device)
    loss, balances = torch.zeros((), device=run.device), []
    for rows in batch.split(rows_each):
        with run.phase("forward"), run.precision():
            output: Output = run.model(rows[:, :-1])
            nats = _token_nats(output.logits, rows[:, 1:]) / run.batch_tokens
        with run.phase("backward"):
            microbatch = _with_all_counts(run, output.balances)
            (
                nats + _auxiliary(run, microbatch, rows.shape[0] * config.max_seq_len * world)
            ).backward()
        loss += nats.detach()
        balances.append([Balance(*(t.detach() for t in b)) for b in microbatch])
    return run.strategy.reduce(loss), [_summed(layer) for layer in zip(*balances)]


def _with_all_counts(run: Run, balances: Sequence[Balance]) -> list[Balance]:
    """Replace the counts of this rank by those of all, of all layers by one collective."""
    if not balances:
        return []
    counts = [balance.counts for balance in balances]
    summed = run.strategy.reduce(torch.cat(counts)).split([each.numel() for each in counts])
    return [balance._replace(counts=each) for balance, each in zip(balances, summed)]


def _summed(balances: Sequence[Balance]) -> Balance:
    first, *rest = balances
    for balance in rest:
        first = Balance(*(a + b for a, b in zip(first, balance)))
    return first


def _token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the cross-entropies of all positions, in float32 at least."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="sum")


def _auxiliary(run: Run, balances: list[Balance], tokens: int) -> Tensor | float:
    layers = moe_layers(run.model)
    if not layers:
        return 0.0
    weighted = run.model.auxiliary(balances, tokens, layers[0].workload.top_k)
    return weighted * (tokens / run.batch_tokens)


def _result(run: Run, fetched: Fetched, lr: float) -> StepResult:
    loss, norm, balances, _ = fetched
    if not balances:
        return StepResult(loss, 0.0, 0.0, norm, lr, [], 0, [])
    tokens, convention = run.batch_tokens, run.model.auxiliary.convention
    top_k = moe_layers(run.model)[0].workload.top_k
    return StepResult(
        loss,
        load_balancing_loss(balances, tokens, top_k, convention).item(),
        z_loss(balances, tokens).item(),
        norm,
        lr,
        [[round(share, 6) for share in load_of(balance)] for balance in balances],
        sum(int(balance.dropped) for balance in balances),
        [layer._asdict() for layer in routing_stats(balances, tokens, top_k, convention)],
    )


def _seed(run: Run) -> None:
    """Seed whatever is random in a step by (seed, step, rank), so that no generator state needs saving."""
    key = f"{run.config.seed}/{run.batch}/{run.strategy.data[0]}"
    torch.manual_seed(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) >> 1)
