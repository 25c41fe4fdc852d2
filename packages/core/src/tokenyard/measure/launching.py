"""What launching costs: host time, times from an idle GPU, and the same work as a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from tokenyard.capture import capture
from tokenyard.measure.timing import CudaClock, Spread, Stages, run_stages


class IdleClock(CudaClock):
    """CUDA events that begin on an idle GPU, so the host's launches count where they are slower."""

    flushes = 1

    def prepare(self, call: Callable[[], object]) -> None:
        """Overwrite the L2 cache, and wait."""
        super().prepare(call)
        torch.cuda.synchronize()


def host_times(stages: Stages, repetitions: int, warmup: int = 3) -> list[Spread]:
    """Return the time until the host has launched everything up to the end of each stage.

    The GPU is idle at the beginning. Work that the host waits for is part of its time.
    """
    samples: list[list[float]] = []
    for _ in range(warmup + repetitions):
        torch.cuda.synchronize()
        result = None
        begin = time.perf_counter()
        sample = []
        for stage in stages:
            result = stage(result)
            sample.append(1e3 * (time.perf_counter() - begin))
        samples.append(sample)
        del result
    return [Spread.of(times) for times in zip(*samples[warmup:])]


def graph_of(stages: Stages, device: torch.device) -> Stages:
    """Return the stages as one, a CUDA graph. Raises RuntimeError if they cannot be captured."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            run_stages(stages)
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        result = run_stages(stages)

    def replay(_: object) -> object:
        graph.replay()
        return result

    return (replay,)
