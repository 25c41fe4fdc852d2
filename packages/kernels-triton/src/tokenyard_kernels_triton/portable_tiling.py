"""How large the tiles of the portable products are: by rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tokenyard_kernels_triton.kernels._tiles import INTERPRETED


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
        return {
            "ROWS": self.rows,
            "DEPTH": self.depth,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


_INTERPRETER = Tiling(32, 32, 32, 4, 1, group=2)
_FLOAT32 = Tiling(64, 64, 16, 8, 2)
_NARROW = Tiling(128, 256, 64, 8, 3)  # 144 KiB of shared memory
_SMALL = Tiling(128, 128, 32, 8, 3)  # 48 KiB


def portable_tiling(dtype: torch.dtype, shared: int, even: bool) -> Tiling:
    """Return the tiles of products in a dtype on a GPU with so many bytes of shared memory for a program.

    Rows that are not `even`, whole 16 bytes, are addressed one by one, which takes registers.
    """
    if INTERPRETED.value:
        return _INTERPRETER
    if dtype == torch.float32:
        return _FLOAT32
    return _NARROW if even and shared >= _NARROW.shared() else _SMALL
