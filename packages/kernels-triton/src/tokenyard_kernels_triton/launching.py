"""Launch Triton kernels, record their launches, or only compile them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_compile_only: ContextVar[bool] = ContextVar("tokenyard_triton_compile_only", default=False)
_record: ContextVar[Callable[[Launch], None] | None] = ContextVar(
    "tokenyard_triton_record", default=None
)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    function: Any  # the kernel as it is written
    grid: tuple[int, int, int]
    arguments: list[Any]  # all of a compiled kernel's parameters; without constants if interpreted
    constants: dict[str, Any]
    kernel: Any  # compiled; None in the interpreter

    def without_tensors(self) -> Launch:
        """Return the launch with None in place of tensors, also inside of TMA descriptors."""
        return replace(self, arguments=[_without_tensor(argument) for argument in self.arguments])


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """Return a function that launches a kernel on a grid; within `compiling`, that compiles it."""
    if _compile_only.get():
        return functools.partial(kernel.warmup, grid=grid)
    record = _record.get()
    if record is not None:
        return functools.partial(_launch_and_record, record, kernel, grid)
    run: Callable[..., Any] = kernel[grid]
    return run


def start(launch: Launch, arguments: list[Any], stream: int) -> None:
    """Repeat a launch on a stream, with these arguments in place of the recorded ones.

    Pointers may be addresses. They and the numbers must be such that Triton would take the same
    compiled kernel.
    """
    kernel = launch.kernel
    if kernel is None:
        launch.function[launch.grid](*arguments, **launch.constants)
        return
    hooks = triton.knobs.runtime
    kernel.run(
        *launch.grid,
        stream,
        kernel.function,
        kernel.packed_metadata,
        kernel.launch_metadata(launch.grid, stream, *arguments),
        hooks.launch_enter_hook,
        hooks.launch_exit_hook,
        *arguments,
    )


def current_stream(device: torch.device) -> int:
    """Return torch's current stream on a GPU, as Triton takes it; 0 on a CPU.

    ``torch._C._cuda_getCurrentRawStream`` is private: torch 2.10 to 2.13.
    """
    if device.type != "cuda":
        return 0
    stream: int = torch._C._cuda_getCurrentRawStream(device.index)
    return stream


def can_record() -> bool:
    """Return whether this thread launches kernels, and does not record them already."""
    return not _compile_only.get() and _record.get() is None


@contextmanager
def recording(record: Callable[[Launch], None]) -> Iterator[None]:
    """Context: pass every launch of this thread to `record`, after it."""
    token = _record.set(record)
    try:
        yield
    finally:
        _record.reset(token)


@contextmanager
def compiling() -> Iterator[None]:
    """Compile the kernels that this thread launches, in parallel, instead of running them.

    The end of the block waits for all of them. Compiled kernels are in Triton's cache afterwards.
    Nothing is computed, so tensors may hold anything. Call gradient functions directly, because
    autograd runs backward passes in another thread.
    """
    token = _compile_only.set(True)
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool):
            yield
    finally:
        _compile_only.reset(token)


def _launch_and_record(
    record: Callable[[Launch], None],
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    **constants: Any,
) -> None:
    with _disable_current_modes():  # what Triton itself calls is not part of the program
        compiled = kernel[grid](*arguments, **constants)
    x, y, z = (*grid, 1, 1)[:3]
    whole = (x, y, z)
    if compiled is None:
        record(Launch(kernel, whole, list(arguments), constants, None))
        return
    driver = triton.runtime.driver.active
    *_, binder = kernel.device_caches[driver.get_current_device()]
    bound, *_ = binder(*arguments, **constants, debug=kernel.debug)
    record(Launch(kernel, whole, list(bound.values()), {}, compiled))


def _without_tensor(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        # An empty tensor is no memory, and is passed as it is.
        return None if argument.numel() else argument
    if not isinstance(getattr(argument, "base", None), Tensor):
        return argument
    bare = object.__new__(type(argument))
    bare.__dict__ = argument.__dict__ | {"base": None}
    return bare
