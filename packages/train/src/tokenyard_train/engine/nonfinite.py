"""Steps whose loss or gradient is not a finite number.

Both numbers cover all ranks, so every rank sees the same and decides the same.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from tokenyard import TokenyardError
from tokenyard.units import counted
from tokenyard_train.engine.state import Run


class NonFiniteError(TokenyardError):
    """The loss or a gradient is not a finite number, and the run stops without taking the step."""


class Skipped(NamedTuple):
    """A step that was not taken. Weights, optimizer and routers are as before it."""

    loss: float
    grad_norm: float


def raise_if_too_many_skipped(run: Run, step: Skipped) -> None:
    """Raise NonFiniteError for a skipped step, unless the config allows one more."""
    config = run.setup.config
    skipped = run.position.skipped_in_a_row + 1
    if config.nonfinite == "stop" or skipped >= config.nonfinite_limit:
        raise NonFiniteError(_sentence(run, step, skipped))


def _sentence(run: Run, step: Skipped, skipped: int) -> str:
    number = f"loss of batch {run.batch + 1} is {step.loss}"
    if math.isfinite(step.loss):
        number = f"gradient norm of batch {run.batch + 1} is {step.grad_norm}"
    steps = counted(skipped - 1, "step before it was", "steps before it were")
    before = f", and {steps} skipped" if skipped > 1 else ""
    return (
        f"the {number}{before}; the step was not taken, and "
        f"earlier checkpoints are in {run.setup.folder}; try a lower optimizer.lr, a longer "
        "scheduler.t_warmup or gradient clipping"
    )
