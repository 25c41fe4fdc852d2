"""The CUDA driver, as cuda.bindings gives it: loading cubins, and launching on torch's stream."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

from tokenyard import TokenyardError
from tokenyard_kernels_cuda.toolchain._cache import cubin_of
from tokenyard_kernels_cuda.toolchain._compile import architecture_of
from tokenyard_kernels_cuda.toolchain._source import Source


class DriverError(TokenyardError):
    """The CUDA driver refused a call."""


def launch(
    source: Source,
    name: str,
    device: int,
    grid: tuple[int, int, int],
    threads: int,
    shared: int,
    arguments: tuple[tuple[Any, ...], tuple[Any, ...]],
) -> None:
    """Start a kernel on the current stream of a GPU; it is compiled if it was never before.

    `shared` is the bytes of shared memory that a block asks for at the launch; `arguments` are values and their ctypes.
    Raises CompileError and DriverError.
    """
    from cuda.bindings import driver

    with _on(device):
        _give_context(driver, device)
        stream = driver.CUstream(torch.cuda.current_stream(device).cuda_stream)
        kernel = function(source, name, device)
        checked(
            driver.cuLaunchKernel(kernel, *grid, threads, 1, 1, shared, stream, arguments, 0),
            f"to launch {name}",
        )


@cache
def function(source: Source, name: str, device: int) -> Any:
    """Return a kernel on a GPU whose context is this thread's. Raises CompileError and DriverError."""
    from cuda.bindings import driver

    kernel = checked(
        driver.cuLibraryGetKernel(_library(source, device), name.encode()),
        f"to find {name} in {source}",
    )
    return checked(driver.cuKernelGetFunction(kernel), f"to load {name} of {source}")


def load(sources: Iterable[Source], device: int) -> None:
    """Compile sources that were never compiled before, in parallel, and load them on a GPU.

    Raises CompileError and DriverError.
    """
    with ThreadPoolExecutor() as pool:
        for loaded in [pool.submit(_load, source, device) for source in sources]:
            loaded.result()


def _load(source: Source, device: int) -> None:
    from cuda.bindings import driver

    with torch.cuda.device(device):
        _give_context(driver, device)
        _library(source, device)


@cache
def _library(source: Source, device: int) -> Any:
    from cuda.bindings import driver

    architecture = architecture_of(torch.cuda.get_device_capability(device))
    loaded = driver.cuLibraryLoadData(cubin_of(source, architecture), [], [], 0, [], [], 0)
    return checked(loaded, f"to load {source}, compiled for {architecture},")


def _on(device: int) -> AbstractContextManager[object]:
    """Make a GPU torch's current one."""
    return nullcontext() if torch.cuda.current_device() == device else torch.cuda.device(device)


def _give_context(driver: Any, device: int) -> None:
    """Give this thread torch's context, if it has none: torch itself gives it one when it first calls the runtime."""
    if not int(checked(driver.cuCtxGetCurrent(), "to tell the context")):
        context = checked(
            driver.cuDevicePrimaryCtxRetain(driver.CUdevice(device)), "to give a context"
        )
        checked(driver.cuCtxSetCurrent(context), "to set the context")


def checked(returned: tuple[Any, ...], doing: str) -> Any:
    """Return what a call of the driver returned besides its result. Raises DriverError."""
    result, *values = returned
    if int(result):
        raise DriverError(f"the CUDA driver refuses {doing} ({result.name})")
    return values[0] if values else None
