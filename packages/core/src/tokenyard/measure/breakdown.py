"""Where the time of a step goes, by kind of work."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from tokenyard.measure.kinds import KINDS, kind_of
from tokenyard.measure.timing import Stages, run_stages

_REGION = "tokenyard: the steps"
_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")
# Of kernels that run at once, the time goes to the first of these.
_ORDER = (*KINDS[:4], "other", "host", *KINDS[4:])


class Span(NamedTuple):
    """A kernel on the device."""

    kind: str
    start: float  # microseconds
    end: float


class Breakdown(NamedTuple):
    """Milliseconds of one step."""

    kinds: dict[str, float]  # by kind; on a CPU "host" is what is left of the step
    host: float  # that the host works


def break_down(stages: Stages, device: torch.device, steps: int) -> Breakdown:
    """Run stages some times under torch's profiler, and return the mean of one step.

    On a GPU, a kind gets the time in which its kernels run: an instant counts once, so collectives
    and copies count where nothing else runs. On a CPU, a kind gets the time of its operators
    without that of the operators that they call. The profiler slows the host down.
    """
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as profiler, record_function(_REGION):
        for _ in range(steps):
            run_stages(stages)
        if gpu:
            torch.cuda.synchronize(device)
    by_name = {e.key: e for e in profiler.key_averages() if e.device_type == DeviceType.CPU}
    total = by_name[_REGION].cpu_time_total
    if gpu:
        kinds = exclusive_times(_spans(profiler.events() or ()))
        kinds["other"] = kinds.get("other", 0.0) + kinds.pop("host", 0.0)
        host = total - sum(by_name[name].cpu_time_total for name in _WAITS if name in by_name)
    else:
        kinds = _operator_times(by_name.values())
        host = kinds["host"] = total - sum(kinds.values())
    order = [kind for kind in (*KINDS, "other", "host") if kinds.get(kind)]
    return Breakdown({kind: kinds[kind] / steps / 1e3 for kind in order}, host / steps / 1e3)


def exclusive_times(spans: Sequence[Span]) -> dict[str, float]:
    """Return the microseconds of each kind. An instant counts once, for one of the spans in it."""
    edges = [(span.start, 1, span.kind) for span in spans]
    edges += [(span.end, -1, span.kind) for span in spans]
    active: Counter[str] = Counter()
    times: dict[str, float] = defaultdict(float)
    before = 0.0
    for now, change, kind in sorted(edges):
        running = next((each for each in _ORDER if active[each]), None)
        if running is not None:
            times[running] += now - before
        active[kind] += change
        before = now
    return times


def _spans(events: Iterable[Any]) -> list[Span]:
    return [
        Span(kind_of(event.name), event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]


def _operator_times(averages: Iterable[Any]) -> dict[str, float]:
    """Return the microseconds of each kind but "host"."""
    times: dict[str, float] = {}
    for average in averages:
        kind = kind_of(average.key)
        if average.key != _REGION and kind not in ("host", "other"):
            times[kind] = times.get(kind, 0.0) + average.self_cpu_time_total
    return times
