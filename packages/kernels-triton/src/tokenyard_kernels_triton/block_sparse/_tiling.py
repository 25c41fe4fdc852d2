"""The tile sizes of block-sparse matmuls, by rule."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from tokenyard_kernels_triton.kernels._tiles import INTERPRETED

BLOCKS = (64, 128)
"""The block sizes that the kernels support."""

WIDE = {64: 4, 128: 2}
"""Block size -> consecutive blocks that the widest tile covers."""

GROUP = 8
"""Block rows that are computed for one block column after another, while both are in cache."""


@dataclass(frozen=True)
class Tiling:
    """The tile of a block-sparse matmul: `rows` by `columns` of the output."""

    rows: int
    columns: int
    depth: int  # of a slice of the reduction dimension
    warps: int
    stages: int  # slices loaded ahead

    def shared(self) -> int:
        """Return the bytes of shared memory that the slices take in a 16-bit dtype."""
        return 2 * self.stages * self.depth * (self.rows + self.columns)

    def options(self) -> dict[str, Any]:
        """Return the arguments of every matmul's launch."""
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "DEPTH": self.depth,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


# few programs, because each of their operations takes a fraction of a millisecond
_INTERPRETER = {64: Tiling(64, 256, 64, 4, 1), 128: Tiling(128, 256, 128, 4, 1)}
_FLOAT32 = Tiling(64, 64, 16, 4, 2)
_LARGE = {64: Tiling(64, 256, 64, 4, 3), 128: Tiling(128, 256, 64, 8, 3)}
_SMALL = {64: Tiling(64, 128, 32, 4, 3), 128: Tiling(128, 128, 32, 8, 3)}


_DEEPER = replace(_LARGE[128], stages=4)
_BY_DEPTH = Tiling(128, 128, 64, 4, 4)
"""For a dense operand whose columns are contiguous: faster than wide tiles on an H200."""


def sparse_output_tiling(block: int, dtype: torch.dtype, shared: int, even: bool) -> Tiling:
    """Return the tile of a dense @ dense matmul, given the shared memory of a program in bytes.

    `even` says that dense operands have strides of a multiple of 16 bytes. Others are addressed
    number by number, which takes registers.
    """
    tiling = _tiling(block, dtype, shared, even)
    deeper = tiling == _LARGE[128] and shared >= _DEEPER.shared()
    return _DEEPER if deeper else tiling


def dense_output_tiling(
    block: int, dtype: torch.dtype, shared: int, even: bool, width: int, by_depth: bool
) -> Tiling:
    """Return the tile of a sparse @ dense matmul whose output has `width` columns.

    `by_depth` says that the columns of the dense operand are contiguous, not its rows.
    """
    tiling = _tiling(block, dtype, shared, even)
    if by_depth and tiling == _LARGE[128]:
        return _BY_DEPTH
    return replace(tiling, columns=128) if width <= 128 < tiling.columns else tiling


def _tiling(block: int, dtype: torch.dtype, shared: int, even: bool) -> Tiling:
    if INTERPRETED.value:
        return _INTERPRETER[block]
    if dtype == torch.float32:
        return _FLOAT32
    large = _LARGE[block]
    return large if even and shared >= large.shared() else _SMALL[block]
