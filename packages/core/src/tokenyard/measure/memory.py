"""Measure the memory that a call saves for backward and allocates at its peak."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from tokenyard.measure.timing import Stages, run_stages


def saved_bytes(forward: Callable[[], object], without: Iterable[Tensor]) -> int:
    """Return the bytes that autograd saves in a forward pass, each storage counted once.

    The storages of the tensors in `without`, such as weights, do not count.
    """
    excluded = {tensor.untyped_storage().data_ptr() for tensor in without}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # kept until the end, so that no address is reused
    del result
    return sum(saved.values())


def peak_bytes(stages: Stages, device: torch.device) -> int:
    """Return the peak of the memory allocated during a run, above what was allocated before."""
    return _cuda_peak(stages, device) if device.type == "cuda" else _cpu_peak(stages)


def _cuda_peak(stages: Stages, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run_stages(stages)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(stages: Stages) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run_stages(stages)
    allocated = 0
    peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak


def allocation_retries(device: torch.device) -> int:
    """Return how often torch had to free its cached GPU memory to serve an allocation, so far.

    Each retry is slow. Always 0 on a CPU.
    """
    return int(torch.cuda.memory_stats(device)["num_alloc_retries"]) if device.type == "cuda" else 0
