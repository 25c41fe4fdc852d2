"""What an optimizer step did."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from tokenyard.losses import stacked_balancing_loss
from tokenyard_train.engine.nonfinite import Skipped
from tokenyard_train.engine.setup import Setup
from tokenyard_train.records.routing import loads_of, routing_stats
from tokenyard_train.records.step_numbers import Fetch, StepNumbers


class StepResult(NamedTuple):
    """The numbers of a step that was taken."""

    loss: float  # nats per supervised token
    balance_loss: float  # unweighted; 0 without experts
    z_loss: float  # unweighted; 0 without experts
    grad_norm: float  # before clipping
    lr: float
    supervised: int  # tokens whose loss is counted; those of text are all tokens
    load: list[list[float]]  # per MoE layer, each expert's share of the slots
    dropped: int  # slots
    routing: list[dict[str, float]]  # per MoE layer, the fields of LayerRouting


@dataclass(frozen=True, eq=False)
class Step:
    """What a step did, and which flags any rank raised."""

    setup: Setup
    numbers: StepNumbers
    lr: float

    @property
    def flags(self) -> list[bool]:
        """Each flag of the step: whether any rank raised it."""
        return self.numbers.flags

    @property
    def skipped(self) -> Skipped | None:
        """Why the step was not taken, if its loss or gradient is not finite."""
        loss, norm = self.numbers.loss, self.numbers.grad_norm
        return None if math.isfinite(loss) and math.isfinite(norm) else Skipped(loss, norm)

    @cached_property
    def result(self) -> StepResult:
        """The numbers of a step that was taken. They are computed when they are first read.

        Raises ValueError for one that was skipped.
        """
        if self.skipped is not None:
            loss, norm = self.skipped
            raise ValueError(
                f"the step has no result, since it was not taken: its loss is {loss} and its "
                f"gradient norm {norm}; read `skipped` first"
            )
        return _result(self.setup, self.numbers, self.lr)


@dataclass(frozen=True, eq=False)
class StepInFlight:
    """A launched step, whose numbers may not have arrived on the host."""

    setup: Setup
    fetch: Fetch
    lr: float

    def wait(self) -> Step:
        """Return what the step did, once the device has done it."""
        return Step(self.setup, self.fetch.wait(), self.lr)


def _result(setup: Setup, numbers: StepNumbers, lr: float) -> StepResult:
    loss, norm, balance, _, (tokens, supervised) = numbers
    if balance is None:
        return StepResult(loss, 0.0, 0.0, norm, lr, supervised, [], 0, [])
    convention = setup.model.auxiliary.convention
    top_k = setup.layers[0].workload.top_k
    balance_loss = stacked_balancing_loss(
        balance.counts, balance.prob_sum, tokens, top_k, convention
    )
    return StepResult(
        loss=loss,
        balance_loss=balance_loss.item(),
        z_loss=balance.z_sum.mean().item() / tokens,
        grad_norm=norm,
        lr=lr,
        supervised=supervised,
        load=loads_of(balance).round(decimals=6).tolist(),
        dropped=int(balance.dropped.sum()),
        routing=[layer._asdict() for layer in routing_stats(balance, tokens, top_k, convention)],
    )
