"""The learning rate of each step."""

from __future__ import annotations

import math

from tokenyard_train.config.schema import SchedulerConfig


def learning_rate(config: SchedulerConfig, peak: float, batch: int, warmup: int, end: int) -> float:
    """Return the learning rate of optimizer step `batch` (from 0), by Composer's formulas.

    It rises linearly from 0 to `peak` over `warmup` steps. Then it changes to alpha_f * peak at
    step `end`: along a half cosine (arXiv 1608.03983), linearly, or not at all.
    """
    if batch < warmup:
        return peak * batch / warmup
    passed = min(1.0, (batch - warmup) / max(1, end - warmup))
    match config.name:
        case "cosine_with_warmup":
            return peak * (
                config.alpha_f + (1 - config.alpha_f) * 0.5 * (1 + math.cos(math.pi * passed))
            )
        case "linear_decay_with_warmup":
            return peak * (1 + (config.alpha_f - 1) * passed)
        case "constant_with_warmup":
            return peak


def check_schedule(config: SchedulerConfig, warmup: int, end: int, batches: int) -> list[str]:
    """Return a sentence for each part of a schedule that makes no sense in a run of `batches`.

    `warmup` and `end` are `t_warmup` and `t_max` in steps.
    """
    if warmup >= batches:
        return [
            f"scheduler.t_warmup is {config.t_warmup}, and the run has {batches} steps: the "
            "learning rate never reaches optimizer.lr; give a shorter t_warmup, such as 0.1dur"
        ]
    if config.name == "constant_with_warmup":
        return []
    faults = []
    if warmup > 0 and warmup >= end:
        faults.append(
            f"scheduler.t_warmup is {config.t_warmup}, not less than t_max {config.t_max}: the "
            "learning rate falls from its peak to its end in one step; give a shorter t_warmup"
        )
    rest = batches - max(warmup, end)
    if config.alpha_f == 0 and rest > 0:
        faults.append(
            f"scheduler.t_max is {config.t_max}, and the run has {batches} steps: the last {rest} "
            "have a learning rate of 0; give t_max: 1dur, or an alpha_f above 0"
        )
    return faults
