"""Clocks, and repetitions that take turns, so that a clock rate that drifts favours nobody."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from random import Random
from statistics import median, quantiles
from typing import Any, NamedTuple, Protocol

import torch

_FLUSH_BYTES = 1 << 29  # more than any L2 holds
_FLUSHES = 16  # about two milliseconds, in which the host runs ahead, as it does in training


class Clock(Protocol):
    """Reads times, in milliseconds, around work on a device."""

    def prepare(self, call: Callable[[], object]) -> None:
        """Bring caches and allocator into the state that each repetition starts from."""
        ...

    def stamp(self) -> Any:
        """Mark this point of the work."""
        ...

    def between(self, stamps: Sequence[Any]) -> list[float]:
        """Wait for the work; return the milliseconds from the first stamp to each later one."""
        ...


class CpuClock:
    """Wall time; the work runs once before it is timed, since others had the caches and the heap in between."""

    def prepare(self, call: Callable[[], object]) -> None:
        """Run it once."""
        call()

    def stamp(self) -> float:
        """Return the time in seconds."""
        return time.perf_counter()

    def between(self, stamps: Sequence[float]) -> list[float]:
        """Return milliseconds."""
        return [1e3 * (stamp - stamps[0]) for stamp in stamps[1:]]


class CudaClock:
    """CUDA events; L2 is overwritten before each repetition."""

    def __init__(self, device: torch.device):
        self.flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def prepare(self, call: Callable[[], object]) -> None:
        """Overwrite L2."""
        for _ in range(_FLUSHES):
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
    """Return the clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


class Spread(NamedTuple):
    """Repeated times of one thing."""

    median: float  # ms
    low: float  # ms, first quartile
    high: float  # ms, third quartile
    repetitions: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Spread:
        """Summarise times in milliseconds."""
        low, _, high = (
            quantiles(times, n=4, method="inclusive") if len(times) > 1 else (times[0],) * 3
        )
        return cls(round(median(times), 5), round(low, 5), round(high, 5), len(times))


Stages = Sequence[Callable[[Any], Any]]
"""Consecutive stages of one work; each takes what the one before returned, the first None."""


def measure(
    works: Mapping[str, Stages], clock: Clock, repetitions: int, warmup: int = 2
) -> dict[str, list[Spread]]:
    """Time works in turns; return for each the times from its start to the end of each of its stages.

    Each round has an order of its own: a GPU that has just worked hard runs slower, whoever comes next.
    """
    times: dict[str, list[list[float]]] = {name: [] for name in works}
    order, shuffled = list(works), Random(0)
    for repetition in range(warmup + repetitions):
        shuffled.shuffle(order)
        for name in order:
            sample = _once(works[name], clock)
            if repetition >= warmup:
                times[name].append(sample)
    return {name: [Spread.of(stage) for stage in zip(*samples)] for name, samples in times.items()}


def _once(stages: Stages, clock: Clock) -> list[float]:
    clock.prepare(lambda: run(stages))
    result, stamps = None, [clock.stamp()]
    for stage in stages:
        result = stage(result)
        stamps.append(clock.stamp())
    return clock.between(stamps)


def run(stages: Stages) -> Any:
    """Run stages one after another; return what the last returns."""
    result = None
    for stage in stages:
        result = stage(result)
    return result
