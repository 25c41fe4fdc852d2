"""What a work asks of the GPU's driver: kernels launched, and waits of the host for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from tokenyard.measure.timing import Stages, run

_REGION = "tokenyard: the work"  # the profiler itself waits for the device when it stops
_WAITS = frozenset(("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize"))


class Kernel(NamedTuple):
    """One kernel of a work."""

    name: str
    calls: int
    milliseconds: float  # all calls together


class Trace(NamedTuple):
    """What the profiler saw of one run of a work."""

    kernels: list[
        Kernel
    ]  # longest first; on a CPU torch's operations, by the time that is their own
    launches: int
    waits: int  # of the host for the device


def trace(stages: Stages, device: torch.device) -> Trace:
    """Run a work under torch's profiler."""
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as profiler:
        with record_function(_REGION):
            run(stages)
        if gpu:
            done = torch.cuda.Event()
            done.record()
            while not done.query():  # waits without a synchronisation, which would be counted
                pass
    events = profiler.events()
    on_device = [e for e in events if e.device_type == DeviceType.CUDA]
    launched = [e for e in on_device if not e.name.startswith(("Memcpy", "Memset", _REGION))]
    region = next(
        e.time_range for e in events if e.name == _REGION and e.device_type == DeviceType.CPU
    )
    waits = sum(
        e.name in _WAITS and region.start <= e.time_range.start <= region.end for e in events
    )
    wanted = DeviceType.CUDA if gpu else DeviceType.CPU
    kernels = [
        Kernel(e.key, e.count, (e.self_device_time_total if gpu else e.self_cpu_time_total) / 1e3)
        for e in profiler.key_averages()
        if e.device_type == wanted and e.key != _REGION
    ]
    return Trace(sorted(kernels, key=lambda k: -k.milliseconds), len(launched), waits)
