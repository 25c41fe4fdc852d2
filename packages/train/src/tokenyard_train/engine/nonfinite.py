"""What happens when a loss or a gradient is not a finite number.

Both numbers are sums over all ranks, so what is not finite on one of them is seen, and judged alike, by all.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from tokenyard import TokenyardError
from tokenyard_train.engine.setup import Run


class NonFiniteError(TokenyardError):
    """The loss or a gradient is not a finite number, and the run stops; the step was not taken."""


class Skipped(NamedTuple):
    """A step that was not taken: weights, optimizer and routers are as before; the next one reads other samples."""

    loss: float
    grad_norm: float


def skipped(run: Run, loss: float, grad_norm: float) -> Skipped | None:
    """Return None if a step may be taken. Raises NonFiniteError if it may not, unless the config says to skip it."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        run.skipped = 0
        return None
    run.skipped += 1
    if run.config.nonfinite == "stop" or run.skipped >= run.config.nonfinite_limit:
        raise NonFiniteError(_sentence(run, loss, grad_norm))
    return Skipped(loss, grad_norm)


def _sentence(run: Run, loss: float, grad_norm: float) -> str:
    name, value = ("gradient norm", grad_norm) if math.isfinite(loss) else ("loss", loss)
    before = f", and {run.skipped - 1} steps before it were skipped" if run.skipped > 1 else ""
    return (
        f"the {name} of batch {run.batch + 1} is {value}{before}; the step was not taken, and what was saved stands in "
        f"{run.folder}; try a lower optimizer.lr, a longer scheduler.t_warmup or gradient clipping"
    )
