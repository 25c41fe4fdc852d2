"""Count kernel launches and host syncs with torch's profiler."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from tokenyard.measure.timing import Stages, run_stages

# Only host syncs inside this region count: the profiler itself waits for the device at its end.
_REGION = "tokenyard: the work"
_SYNCS = frozenset(("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize"))


class Kernel(NamedTuple):
    """All launches of one kernel."""

    name: str
    calls: int
    milliseconds: float  # of all calls together


class Trace(NamedTuple):
    """Profile of one run."""

    kernels: list[Kernel]  # longest first; on a CPU torch's operators, by self time
    sequence: list[Kernel]  # each launch, in the order in which they ran; empty on a CPU
    launches: int
    waits: int  # host syncs
    wait_ms: float  # that the host is blocked in them


def trace(stages: Stages, device: torch.device) -> Trace:
    """Run stages once under torch's profiler."""
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as profiler:
        with record_function(_REGION):
            run_stages(stages)
        if gpu:
            _wait_without_sync()
    events = profiler.events()
    launches = _launches(events)
    kernels = _kernels(profiler.key_averages(), gpu)
    syncs = _host_syncs(events)
    return Trace(kernels, launches, len(launches), len(syncs), sum(syncs))


def _wait_without_sync() -> None:
    """Wait for the device by polling, because a synchronisation would be counted."""
    done = torch.cuda.Event()
    done.record()
    while not done.query():
        pass


def _kernels(averages: Iterable[Any], gpu: bool) -> list[Kernel]:
    device_type = DeviceType.CUDA if gpu else DeviceType.CPU
    kernels = [
        Kernel(e.key, e.count, (e.self_device_time_total if gpu else e.self_cpu_time_total) / 1e3)
        for e in averages
        if e.device_type == device_type and e.key != _REGION
    ]
    return sorted(kernels, key=lambda kernel: -kernel.milliseconds)


def _launches(events: Iterable[Any]) -> list[Kernel]:
    """Return each launch, in the order in which they began."""
    launched = [
        event
        for event in events
        if event.device_type == DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset", _REGION))
    ]
    launched.sort(key=lambda event: event.time_range.start)
    return [Kernel(event.name, 1, event.time_range.elapsed_us() / 1e3) for event in launched]


def _host_syncs(events: Iterable[Any]) -> list[float]:
    """Return the milliseconds of each host sync in the region."""
    region = next(
        event.time_range
        for event in events
        if event.name == _REGION and event.device_type == DeviceType.CPU
    )
    return [
        event.time_range.elapsed_us() / 1e3
        for event in events
        if event.name in _SYNCS and region.start <= event.time_range.start <= region.end
    ]
