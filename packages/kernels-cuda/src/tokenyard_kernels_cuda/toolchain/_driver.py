"""The CUDA driver through cuda.bindings: load cubins and launch kernels on torch's stream."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from struct import Struct
from typing import Any

import torch

from tokenyard import TokenyardError
from tokenyard.cuda_driver import launch_kernel
from tokenyard_kernels_cuda.toolchain._cache import cubin_of
from tokenyard_kernels_cuda.toolchain._compile import architecture_of
from tokenyard_kernels_cuda.toolchain._source import Source


class DriverError(TokenyardError):
    """A call of the CUDA driver failed."""


class _Thread(threading.local):
    """What a thread needs for its launches."""

    def __init__(self) -> None:
        self.devices: set[int] = set()  # whose context is known to be current with the device


_thread = _Thread()


def launch(
    source: Source,
    name: str,
    device: int,
    grid: tuple[int, int, int],
    threads: int,
    shared: int,
    arguments: tuple[tuple[Any, ...], Struct],
) -> None:
    """Launch a kernel on the current stream of a GPU; compile it first if needed.

    `shared` is the dynamic shared memory per block, in bytes. `arguments` are the values and their
    layout in memory. Raises CompileError and DriverError.

    Where the GPU can, the kernel begins before the launch before it has ended: every kernel of this
    package waits for that first. ``torch._C._cuda_getCurrentRawStream`` is private: torch 2.10 to
    2.13.
    """
    values, layout = arguments
    with _current_device(device):
        if device not in _thread.devices:
            _ensure_context(device)
            _thread.devices.add(device)
        kernel = function(source, name, device)
        stream = torch._C._cuda_getCurrentRawStream(device)
        sizes = (*grid, threads, 1, 1, shared)
        result = launch_kernel(kernel, sizes, stream, layout, values, _can_chain(device))
    if result:
        from cuda.bindings import driver

        checked((driver.CUresult(result),), f"to launch {name}")


@cache
def _can_chain(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def function(source: Source, name: str, device: int) -> ctypes.c_void_p:
    """Return the driver's handle of a kernel. Raises CompileError and DriverError.

    The GPU's context must be current in this thread.
    """
    from cuda.bindings import driver

    kernel = checked(
        driver.cuLibraryGetKernel(_library(source, device), name.encode()),
        f"to find {name} in {source}",
    )
    handle = checked(driver.cuKernelGetFunction(kernel), f"to load {name} of {source}")
    return ctypes.c_void_p(int(handle))


def load(sources: Iterable[Source], device: int) -> None:
    """Compile sources in parallel, unless cached, and load them on a GPU.

    Raises CompileError and DriverError.
    """
    with ThreadPoolExecutor() as pool:
        for future in [pool.submit(_load, source, device) for source in sources]:
            future.result()


def _load(source: Source, device: int) -> None:
    with torch.cuda.device(device):
        _ensure_context(device)
        _library(source, device)


@cache
def _library(source: Source, device: int) -> Any:
    from cuda.bindings import driver

    architecture = architecture_of(torch.cuda.get_device_capability(device))
    returned = driver.cuLibraryLoadData(cubin_of(source, architecture), [], [], 0, [], [], 0)
    return checked(returned, f"to load {source}, compiled for {architecture},")


def _current_device(device: int) -> AbstractContextManager[object]:
    """Make a GPU torch's current device."""
    if torch.cuda.current_device() == device:
        return nullcontext()
    return torch.cuda.device(device)


def _ensure_context(device: int) -> None:
    """Set torch's CUDA context in this thread if it has none.

    A new thread has no context until its first call of the CUDA runtime, which torch makes late.
    """
    from cuda.bindings import driver

    if not int(checked(driver.cuCtxGetCurrent(), "to tell the context")):
        context = checked(
            driver.cuDevicePrimaryCtxRetain(driver.CUdevice(device)), "to give a context"
        )
        checked(driver.cuCtxSetCurrent(context), "to set the context")


def checked(returned: tuple[Any, ...], action: str) -> Any:
    """Return the value of a driver call. Raises DriverError if it failed."""
    result, *values = returned
    if int(result):
        raise DriverError(f"the CUDA driver refuses {action} ({result.name})")
    return values[0] if values else None
