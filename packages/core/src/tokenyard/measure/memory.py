"""Measure the memory that a call saves for backward and allocates at its peak."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

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

    def pack(tensor: Tensor) -> torch.UntypedStorage:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            saved[storage.data_ptr()] = storage.nbytes()
        # Not the tensor: a node that saves its own result would then never be freed, nor the
        # AccumulateGrad nodes behind it, whose stream no later CUDA graph could leave.
        return storage

    with saved_tensors_hooks(pack, _no_backward):
        result = forward()  # kept until the end, so that no address is reused
    del result
    return sum(saved.values())


def _no_backward(storage: torch.UntypedStorage) -> Tensor:
    raise RuntimeError("saved_bytes measures a forward pass only; its result has no gradient")


def held_bytes(forward: Callable[[], object], device: torch.device) -> int:
    """Return the bytes that a forward pass allocates and that its result, or a cache, still holds.

    This counts tensors that autograd does not save, such as those that selective recompute keeps.
    """
    gc.collect()  # else what is collected in the pass counts as freed by it
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        result = forward()
        held = torch.cuda.memory_allocated(device) - before
    else:
        with _profile_memory() as profiler:
            result = forward()
        held = sum(_allocations(profiler))
    del result
    return held


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
    with _profile_memory() as profiler:
        run_stages(stages)
    return max(accumulate(_allocations(profiler), initial=0))


def _profile_memory() -> profile:
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def _allocations(profiler: Any) -> list[int]:
    """Return the bytes of each allocation, in order; they are negative where memory is freed."""
    events = profiler.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())]


def allocation_retries(device: torch.device) -> int:
    """Return how often torch had to free its cached GPU memory to serve an allocation, so far.

    Each retry is slow. Always 0 on a CPU.
    """
    return int(torch.cuda.memory_stats(device)["num_alloc_retries"]) if device.type == "cuda" else 0
