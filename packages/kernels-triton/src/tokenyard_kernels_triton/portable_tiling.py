"""The tile sizes of the portable matmuls, by rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tokenyard_kernels_triton.kernels._tiles import INTERPRETED


@dataclass(frozen=True)
class PortableTiling:
    """The tile of a portable matmul: `rows` by `columns` of the output."""

    rows: int
    columns: int  # in a gated up matmul, of gate and up together
    depth: int  # of a slice of the reduction dimension
    warps: int
    stages: int  # slices loaded ahead
    group: int = 16  # row tiles that use a column tile of the weights while it is in cache
    precision: str = "ieee"  # of float32 that must not be rounded to TF32

    def shared(self) -> int:
        """Return the bytes of shared memory that the slices take in a 16-bit dtype."""
        return 2 * self.stages * self.depth * (self.rows + self.columns)

    def options(self) -> dict[str, Any]:
        """Return the arguments of every matmul's launch."""
        return {
            "ROWS": self.rows,
            "DEPTH": self.depth,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


_INTERPRETER = PortableTiling(32, 32, 32, 4, 1, group=2)
_LARGE = PortableTiling(128, 256, 64, 8, 3)  # 144 KiB of shared memory
_SMALL = PortableTiling(128, 128, 32, 8, 3)  # 48 KiB

# Float32 numbers are the sum of two TF32 numbers, whose products tensor cores add up. On an H200
# that is 1.9 times as fast as cuBLAS, which has FMA units alone, and for sums of 2048 products it
# errs less: 2.0e-7 against 4.9e-7. For short sums it errs more, so FMA units compute these. GeForce
# GPUs have fewer tensor cores, and less shared memory. FMA units suffice for gradients of weights,
# whose operands are both transposed.
_FLOAT32 = PortableTiling(128, 128, 16, 8, 2)
_FLOAT32_SPLIT = PortableTiling(128, 128, 32, 8, 3, precision="tf32x3")  # 96 KiB
_FLOAT32_GRADIENT = PortableTiling(128, 64, 16, 8, 3)
_DATA_CENTRE = 160_000  # bytes of shared memory
_LONG = 512  # products of a sum


def portable_tiling(
    dtype: torch.dtype, shared: int, even: bool, summed: int, of_weights: bool = False
) -> PortableTiling:
    """Return the tile of matmuls in a dtype, given the bytes of shared memory of a program.

    `even` says that rows are a multiple of 16 bytes. Other rows are addressed number by number,
    which takes registers. Numbers of the result are sums of `summed` products. `of_weights` says
    that it is a gradient of weights.
    """
    if INTERPRETED.value:
        return _INTERPRETER
    if dtype == torch.float32:
        if of_weights:
            return _FLOAT32_GRADIENT
        split = even and summed >= _LONG and shared >= _DATA_CENTRE
        return _FLOAT32_SPLIT if split else _FLOAT32
    return _LARGE if even and shared >= _LARGE.shared() else _SMALL
