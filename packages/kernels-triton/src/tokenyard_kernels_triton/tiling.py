"""How large the tiles of each product are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from tokenyard_kernels_triton.kernels._tiles import INTERPRETED

Product = Literal["up", "down", "activation_gradient", "input_gradient", "up_gradient", "down_gradient"]


@dataclass(frozen=True)
class Tiling:
    """The tile of one product: `rows` by `columns` of the output, `depth` of what is summed over at a time."""

    rows: int
    columns: int  # of the output; of a gated up product, gate and up together
    depth: int
    warps: int
    stages: int  # tiles that are loaded ahead
    group: int = 8  # row tiles that share a column of weights while it is in cache
    flatten: bool = False  # load the next tile's operands while this one's results are written
    pieces: int = 1  # the epilogue takes the columns in so many pieces

    def options(self) -> dict[str, Any]:
        """Return what every product's launch takes."""
        return {
            "ROWS": self.rows,
            "DEPTH": self.depth,
            "GROUP": self.group,
            "FLATTEN": self.flatten,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


_INTERPRETER = Tiling(32, 32, 32, 4, 1, group=2, pieces=2)
_FLOAT32 = Tiling(64, 64, 16, 8, 2)
_POINTERS = Tiling(128, 128, 32, 8, 3, pieces=4)

_HOPPER: dict[Product, Tiling] = {
    "up": Tiling(128, 256, 64, 8, 3),
    "down": Tiling(128, 256, 64, 8, 3),
    "activation_gradient": Tiling(128, 256, 64, 8, 3, pieces=4),
    "input_gradient": Tiling(128, 256, 64, 8, 3),
    "up_gradient": Tiling(128, 256, 64, 8, 3),
    "down_gradient": Tiling(128, 256, 64, 8, 3),
}


def tiling(product: Product, dtype: torch.dtype, tma: bool) -> Tiling:
    """Return the tiles of a product in a dtype, with or without the copy engine."""
    if INTERPRETED.value:
        return _INTERPRETER
    if dtype == torch.float32:
        return _FLOAT32
    return _HOPPER[product] if tma else _POINTERS
