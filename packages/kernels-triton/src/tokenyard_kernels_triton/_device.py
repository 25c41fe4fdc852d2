"""Properties of a device, and arithmetic for launches."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

GLUON = ("3.6", "3.7", "3.8", "3.9")  # Gluon is experimental: its names change between versions
_INTERPRETED_PROGRAMS = 2  # of the tests' interpreter: few, so that each has several tiles


@functools.cache
def processors(device: torch.device) -> int:
    """Return the number of a GPU's multiprocessors, which is that of persistent programs."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def persistent_grid(device: torch.device, tiles: int) -> tuple[int]:
    """Return the grid of a persistent kernel over `tiles` tiles."""
    return (min(processors(device), tiles),)


def current_device() -> torch.device:
    """Return the current GPU, or the CPU if there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program can have; on a CPU, those of Hopper."""
    if device.type != "cuda":
        return 232448
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 101376))


@functools.cache
def runs_gluon(device: torch.device) -> bool:
    """Return whether a device is a Hopper GPU, and Triton a version that Gluon was tried with."""
    if device.type != "cuda" or torch.version.hip is not None:  # AMD GPUs have such numbers, too
        return False
    return torch.cuda.get_device_capability(device)[0] == 9 and triton_minor_version() in GLUON


@functools.cache
def chained(device: torch.device) -> dict[str, Any]:
    """Return the options by which a launch begins before the one before it has ended, if it can.

    ``kernels._chain`` says what the kernel must do then.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return {"CHAINED": False}
    can = torch.cuda.get_device_capability(device) >= (9, 0)
    return {"CHAINED": True, "launch_pdl": True} if can else {"CHAINED": False}


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make a tensor's GPU the current one, because Triton launches on that."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def triton_version() -> str:
    """Return the version of Triton under any of its distributions' names, or "unknown"."""
    for name in ("triton", "pytorch-triton", "triton-nightly"):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "unknown"


def triton_minor_version() -> str:
    """Return the first two numbers of Triton's version, such as "3.6"."""
    return ".".join(triton_version().split(".")[:2])


def may_round_float32() -> bool:
    """Return whether torch may round the operands of float32 matmuls to TF32 on a GPU.

    ``torch.get_float32_matmul_precision`` raises an error after the newer setting that this reads.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def power_of_two(number: int) -> int:
    """Return the least power of two that is at least a number."""
    return 1 << max(0, number - 1).bit_length()


def ceil_div(number: int, by: int) -> int:
    """Return number / by, rounded up."""
    return -(-number // by)
