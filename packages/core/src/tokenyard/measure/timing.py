"""Time calls in shuffled turns, so that a drifting clock rate affects all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from random import Random
from statistics import median, quantiles
from typing import Any, NamedTuple, Protocol

import torch

_FLUSH_BYTES = 1 << 29  # larger than any L2 cache

Stages = Sequence[Callable[[Any], Any]]
"""Consecutive stages of one computation. Each takes the result of the stage before, or None."""


class Clock(Protocol):
    """Measures milliseconds on a device."""

    def prepare(self, call: Callable[[], object]) -> None:
        """Bring caches and allocator into the state from which each repetition starts."""
        ...

    def stamp(self) -> Any:
        """Mark this point in time."""
        ...

    def between(self, stamps: Sequence[Any]) -> list[float]:
        """Wait for the device. Return the milliseconds from the first stamp to each later one."""
        ...


class CpuClock:
    """Wall time. Runs the call once before timing it, to fill the caches and warm the heap."""

    def prepare(self, call: Callable[[], object]) -> None:
        """Run the call once."""
        call()

    def stamp(self) -> float:
        """Return the time in seconds."""
        return time.perf_counter()

    def between(self, stamps: Sequence[float]) -> list[float]:
        """Return milliseconds."""
        return [1e3 * (stamp - stamps[0]) for stamp in stamps[1:]]


class CudaClock:
    """CUDA events. Overwrites the L2 cache before each repetition."""

    flushes = 48  # about 6 ms, in which even slow launches run ahead of the device, as in training

    def __init__(self, device: torch.device):
        self.flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def prepare(self, call: Callable[[], object]) -> None:
        """Overwrite the L2 cache."""
        for _ in range(self.flushes):
            self.flush.zero_()

    def stamp(self) -> torch.cuda.Event:
        """Record an event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, stamps: Sequence[torch.cuda.Event]) -> list[float]:
        """Return milliseconds."""
        torch.cuda.synchronize()
        return [stamps[0].elapsed_time(stamp) for stamp in stamps[1:]]


def clock_for(device: torch.device) -> Clock:
    """Return the clock for a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


class Spread(NamedTuple):
    """Median and quartiles of repeated times."""

    median: float  # ms
    low: float  # ms, first quartile
    high: float  # ms, third quartile
    repetitions: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Spread:
        """Summarise times in milliseconds."""
        if len(times) > 1:
            low, _, high = quantiles(times, n=4, method="inclusive")
        else:
            low = high = times[0]
        return cls(round(median(times), 5), round(low, 5), round(high, 5), len(times))

    def of_one(self, count: int) -> Spread:
        """Return the times of one of `count` equal parts."""
        median, low, high = (round(time / count, 5) for time in self[:3])
        return Spread(median, low, high, self.repetitions)


def _silent(done: int, rounds: int) -> None:
    """Report nothing."""


def measure(
    calls: Mapping[str, Stages],
    clock: Clock,
    repetitions: int,
    warmup: int = 2,
    report: Callable[[int, int], None] = _silent,
) -> dict[str, list[Spread]]:
    """Time calls in turns. Return, for each, the time from its start to the end of each stage.

    Each round shuffles the order, because a GPU runs slower right after heavy work, which would
    always hit the same call. `report` receives, before each round, the rounds that are done and
    their number, warm-up included.
    """
    times: dict[str, list[list[float]]] = {name: [] for name in calls}
    order = list(calls)
    generator = Random(0)
    for repetition in range(warmup + repetitions):
        report(repetition, warmup + repetitions)
        generator.shuffle(order)
        for name in order:
            sample = _time_once(calls[name], clock)
            if repetition >= warmup:
                times[name].append(sample)
    return {name: [Spread.of(stage) for stage in zip(*samples)] for name, samples in times.items()}


def _time_once(stages: Stages, clock: Clock) -> list[float]:
    clock.prepare(lambda: run_stages(stages))
    result = None
    stamps = [clock.stamp()]
    for stage in stages:
        result = stage(result)
        stamps.append(clock.stamp())
    return clock.between(stamps)


def run_stages(stages: Stages) -> Any:
    """Run all stages. Return the result of the last."""
    result = None
    for stage in stages:
        result = stage(result)
    return result
