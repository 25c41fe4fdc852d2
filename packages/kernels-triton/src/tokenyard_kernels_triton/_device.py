"""What the launches ask of a device."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib import metadata

import torch
from torch import Tensor

_INTERPRETED_PROGRAMS = 2  # enough that a loop over tiles has several to do


@functools.cache
def processors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has, which is how many persistent programs are started."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def persistent_grid(device: torch.device, tiles: int) -> tuple[int]:
    """Return how many programs walk over so many tiles."""
    return (min(processors(device), tiles),)


def current_device() -> torch.device:
    """Return the GPU that is current, or the CPU where there is none."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that one program can have; without a GPU, a Hopper's."""
    if device.type != "cuda":
        return 232448
    return int(
        getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 101376)
    )


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make a tensor's GPU the current one, which is where Triton launches."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def triton_version() -> str:
    """Return the version of the installed Triton, under whichever name it was distributed; "unknown" if under none."""
    for name in ("triton", "pytorch-triton", "triton-nightly"):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "unknown"


def power_of_two(number: int) -> int:
    """Return the least power of two that is not below a number."""
    return 1 << max(0, number - 1).bit_length()


def ceil_div(number: int, by: int) -> int:
    """Return number / by, rounded up."""
    return -(-number // by)
