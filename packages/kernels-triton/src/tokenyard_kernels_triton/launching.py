"""Launching Triton kernels, or only compiling them: several at once, before the first launch needs them."""

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
    """Return what starts a kernel on a grid when it is called; within `compiling`, what compiles it instead."""
    if _compile_only.get():
        return functools.partial(kernel.warmup, grid=grid)
    started: Callable[..., Any] = kernel[grid]
    return started


@contextmanager
def compiling() -> Iterator[None]:
    """Compile every kernel that this thread launches, in parallel, and start none; wait for all at the end.

    Nothing is computed, so tensors may hold anything. Compiled kernels are in Triton's cache afterwards. Autograd runs
    backward passes in a thread of its own, so call gradient functions directly.
    """
    token = _compile_only.set(True)
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool):
            yield
    finally:
        _compile_only.reset(token)
