"""How much memory a work takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from tokenyard.measure.timing import Stages, run


def saved_bytes(forward: Callable[[], object], without: Iterable[Tensor]) -> int:
    """Return the bytes that autograd keeps from a forward pass for its backward, each storage once.

    Those of the tensors in `without`, such as weights, are not counted.
    """
    known = {t.untyped_storage().data_ptr() for t in without}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # held, so that no address is used twice
    del result
    return sum(kept.values())


def peak_bytes(stages: Stages, device: torch.device) -> int:
    """Return the most memory that a work has allocated at one moment, above what stood before it."""
    return _cuda_peak(stages, device) if device.type == "cuda" else _cpu_peak(stages)


def _cuda_peak(stages: Stages, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run(stages)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(stages: Stages) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(stages)
    standing = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            standing += event.nbytes()
            peak = max(peak, standing)
    return peak


def allocation_retries(device: torch.device) -> int:
    """Return how often so far the GPU's memory was so full that torch gave back what it kept, which takes long."""
    return int(torch.cuda.memory_stats(device)["num_alloc_retries"]) if device.type == "cuda" else 0
