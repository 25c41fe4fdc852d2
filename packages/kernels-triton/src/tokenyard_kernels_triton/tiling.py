"""How large the tiles of each product are: as measured on one H200 for Hopper, by rule elsewhere; nothing is tuned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from tokenyard_kernels_triton.kernels._tiles import INTERPRETED

Product = Literal["up", "down", "activation_gradient", "input_gradient", "up_gradient", "down_gradient"]


@dataclass(frozen=True)
class Tiling:
    """The tile of one portable product: `rows` by `columns` of the output, `depth` of what is summed over at a time."""

    rows: int
    columns: int  # of the output; of a gated up product, gate and up together
    depth: int
    warps: int
    stages: int  # slices that are loaded ahead
    group: int = 16  # row tiles that one column of weights is used for while it is in cache

    def shared(self) -> int:
        """Return the bytes of shared memory that the slices take, of 2 bytes a number."""
        return 2 * self.stages * self.depth * (self.rows + self.columns)

    def options(self) -> dict[str, Any]:
        """Return what every product's launch takes."""
        return {"ROWS": self.rows, "DEPTH": self.depth, "num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class HopperTiling:
    """The tile of one product on Hopper: 128 rows by `columns` of the output."""

    stages: int = 3  # slices that are loaded ahead
    chunk: int = 64  # columns that leave at a time
    buffers: int = 1  # of so many columns
    columns: int = 256
    depth: int = 64
    group: int = 32  # row tiles that one column of weights is used for while it is in cache

    def options(self) -> dict[str, int]:
        """Return what every product's launch takes."""
        return {
            "COLUMNS": self.columns,
            "DEPTH": self.depth,
            "CHUNK": self.chunk,
            "STAGES": self.stages,
            "BUFFERS": self.buffers,
        }


_INTERPRETER = Tiling(32, 32, 32, 4, 1, group=2)
_FLOAT32 = Tiling(64, 64, 16, 8, 2)
_NARROW = Tiling(128, 256, 64, 8, 3)  # 144 KiB of shared memory
_SMALL = Tiling(128, 128, 32, 8, 3)  # 48 KiB

_HOPPER: dict[Product, HopperTiling] = {
    "up": HopperTiling(stages=3, chunk=64, group=16),
    "down": HopperTiling(stages=3, chunk=128, buffers=2),
    "activation_gradient": HopperTiling(stages=3, chunk=128, buffers=2),
    "input_gradient": HopperTiling(stages=4, chunk=64, buffers=2),
    "up_gradient": HopperTiling(stages=4, chunk=64, buffers=2, group=16),
    "down_gradient": HopperTiling(stages=4, chunk=64, buffers=2, group=16),
}


def portable_tiling(dtype: torch.dtype, shared: int, even: bool) -> Tiling:
    """Return the tiles of products in a dtype on a GPU with so many bytes of shared memory for a program.

    Rows that are not `even`, whole 16 bytes, are addressed one by one, which takes registers.
    """
    if INTERPRETED.value:
        return _INTERPRETER
    if dtype == torch.float32:
        return _FLOAT32
    return _NARROW if even and shared >= _NARROW.shared() else _SMALL


def hopper_tiling(product: Product) -> HopperTiling:
    """Return the tiles of a product on Hopper, in bfloat16 or float16."""
    return _HOPPER[product]
