"""Every source that this package may compile, each with every set of macros that it is ever compiled with."""

from __future__ import annotations

from tokenyard_kernels_cuda.ops._logits import NARROW, split_kernel
from tokenyard_kernels_cuda.ops._moves import ELEMENTS, moves, vectors_of
from tokenyard_kernels_cuda.ops._plan import KERNELS
from tokenyard_kernels_cuda.ops._sizes import WARP
from tokenyard_kernels_cuda.ops._topk import MOST_EXPERTS, routes
from tokenyard_kernels_cuda.toolchain import Kernel, Source


def kernels() -> list[Kernel]:
    """List all kernels."""
    found = [*KERNELS, *(split_kernel(dtype) for dtype in NARROW)]
    for dtype in ELEMENTS:
        for vector in vectors_of(dtype):
            found += moves(dtype, vector)[1:]
    experts = WARP
    while experts <= MOST_EXPERTS:
        found += routes(experts)
        experts *= 2
    return found


def sources() -> list[Source]:
    """List all sources, each once."""
    return list(dict.fromkeys(kernel.source for kernel in kernels()))
