"""Launch Triton kernels, or only compile them, in parallel and before the first launch."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import triton

_compile_only: ContextVar[bool] = ContextVar("tokenyard_triton_compile_only", default=False)


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """Return a function that launches a kernel on a grid; within `compiling`, that compiles it."""
    if _compile_only.get():
        return functools.partial(kernel.warmup, grid=grid)
    run: Callable[..., Any] = kernel[grid]
    return run


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
