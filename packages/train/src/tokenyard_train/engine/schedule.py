"""The learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from tokenyard_train.config.duration import Span
from tokenyard_train.config.scheduler import SchedulerConfig


class ScheduleSteps(NamedTuple):
    """The times of a schedule in optimizer steps."""

    warmup: int
    end: int  # of the decay
    scale: int = 1  # of inv_sqrt_with_warmup
    cooldown: int = 0  # the last of them, of inv_sqrt_with_warmup


def schedule_steps(config: SchedulerConfig, steps: Callable[[Span], int]) -> ScheduleSteps:
    """Return the times of a schedule. `steps` converts a span."""
    if config.t_scale is None or config.t_cooldown is None:
        return ScheduleSteps(steps(config.t_warmup), steps(config.t_max))
    scale = max(1, steps(config.t_scale))
    return ScheduleSteps(
        steps(config.t_warmup), steps(config.t_max), scale, steps(config.t_cooldown)
    )


def learning_rate(config: SchedulerConfig, peak: float, batch: int, times: ScheduleSteps) -> float:
    """Return the learning rate of optimizer step `batch` (from 0).

    By the formulas of Composer and, for the inverse square root, of LLM Foundry. The rate rises
    linearly from 0 over the warm-up. Then it changes until the end: along a half cosine (arXiv
    1608.03983), linearly, as an inverse square root with a linear end, or not at all.
    """
    warmup = times.warmup
    if batch < warmup:
        return peak * _start(config) * batch / warmup
    passed = 0.0
    if times.end > warmup:
        passed = min(1.0, (batch - warmup) / (times.end - warmup))
    match config.name:
        case "cosine_with_warmup":
            bow = (1 + math.cos(math.pi * passed)) / 2
            return peak * (config.alpha_f + (1 - config.alpha_f) * bow)
        case "linear_decay_with_warmup":
            return peak * (config.alpha_i + passed * (config.alpha_f - config.alpha_i))
        case "constant_with_warmup":
            return peak * config.alpha
        case "inv_sqrt_with_warmup":
            return peak * _inverse_root(config, batch, times)


def _start(config: SchedulerConfig) -> float:
    """Return the multiple of the peak at which the warm-up ends."""
    starts = {"linear_decay_with_warmup": config.alpha_i, "constant_with_warmup": config.alpha}
    return starts.get(config.name, 1.0)


def _inverse_root(config: SchedulerConfig, batch: int, times: ScheduleSteps) -> float:
    """Return LLM Foundry's factor after the warm-up: an inverse square root, then a line."""
    shift = times.scale - times.warmup
    last = max(times.end - times.cooldown, times.warmup)
    root = math.sqrt((min(batch, last) + shift) / times.scale)
    factor = config.alpha_f_decay + (1 - config.alpha_f_decay) / root
    if batch < last or times.cooldown == 0:
        return factor
    passed = min(1.0, (batch - last) / times.cooldown)
    return factor + passed * (config.alpha_f_cooldown - factor)


def check_schedule(config: SchedulerConfig, warmup: int, end: int, batches: int) -> list[str]:
    """Return a sentence for each part of a schedule that makes no sense in a run of `batches`.

    `warmup` and `end` are `t_warmup` and `t_max` in steps.
    """
    if warmup >= batches:
        return [
            f"scheduler.t_warmup is {config.t_warmup}, and the run has {batches} steps: the "
            "learning rate never reaches optimizer.lr; give a shorter t_warmup, such as 0.1dur"
        ]
    if config.name in ("constant_with_warmup", "inv_sqrt_with_warmup"):
        return []
    if warmup > 0 and warmup >= end:
        return [
            f"scheduler.t_warmup is {config.t_warmup}, not less than t_max {config.t_max}: the "
            "learning rate stays at its peak; give a shorter t_warmup"
        ]
    rest = batches - end
    if config.alpha_f == 0 and rest > 0:
        return [
            f"scheduler.t_max is {config.t_max}, and the run has {batches} steps: the last {rest} "
            "have a learning rate of 0; give t_max: 1dur, or an alpha_f above 0"
        ]
    return []
