"""List of every kernel of this package, and of every source with each set of macros it needs."""

from __future__ import annotations

from tokenyard_kernels_cuda.ops._logits import NARROW, logits_kernels
from tokenyard_kernels_cuda.ops._moves import ELEMENTS, move_kernels, vectors_of
from tokenyard_kernels_cuda.ops._plan import KERNELS
from tokenyard_kernels_cuda.ops._sizes import WARP
from tokenyard_kernels_cuda.ops._topk import MOST_EXPERTS, route_kernels
from tokenyard_kernels_cuda.toolchain import Kernel, Source


def kernels() -> list[Kernel]:
    """List all kernels."""
    all_kernels = [*KERNELS, *(kernel for dtype in NARROW for kernel in logits_kernels(dtype))]
    for dtype in ELEMENTS:
        for vector in vectors_of(dtype):
            all_kernels += move_kernels(dtype, vector).kernels()
    experts = WARP
    while experts <= MOST_EXPERTS:
        all_kernels += route_kernels(experts)
        experts *= 2
    return all_kernels


def sources() -> list[Source]:
    """List all sources, without duplicates."""
    return list(dict.fromkeys(kernel.source for kernel in kernels()))
