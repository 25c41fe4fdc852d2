"""Launches of products of batches of matrices that are known to be symmetric."""

from __future__ import annotations

import functools

from torch import Tensor

from tokenyard_kernels_triton._device import ceil_div, persistent_grid, processors
from tokenyard_kernels_triton.kernels import _gluon_symmetric
from tokenyard_kernels_triton.launching import launch
from tokenyard_kernels_triton.ops._gluon_operands import stacked

_ROWS = 128  # of a tile
_COLUMNS = 128  # with 256, an H200 takes 1.1 to 1.2 times as long
_DEPTH = 64  # of a slice of the reduction dimension
_STAGES = 6  # slices loaded ahead


def symmetric_product(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    alpha: float = 1.0,
    addend: Tensor | None = None,
    beta: float = 1.0,
    diagonal: float = 0.0,
) -> None:
    """Write alpha * left @ right^T + beta * addend + diagonal * I to out [B, N, N].

    left and right are [B, N, K], contiguous, or both transposed views of contiguous tensors.
    """
    transposed = not left.is_contiguous()
    one, other = (left.mT, right.mT) if transposed else (left, right)
    matrices, size, _ = left.shape
    boxes = [(64, _DEPTH), (_COLUMNS, _DEPTH)]
    if transposed:
        boxes = [(depth, width) for width, depth in boxes]
    tiles = _tiles(size)
    launch(_gluon_symmetric.symmetric_product, persistent_grid(out.device, matrices * tiles))(
        stacked(one, 1, boxes[0]),
        stacked(other, 1, boxes[1]),
        addend,
        stacked(out, 1, (64, 64)),
        *left.shape,
        tiles,
        float(alpha),
        float(beta),
        float(diagonal),
        TRANSPOSED=transposed,
        DEPTH=_DEPTH,
        COLUMNS=_COLUMNS,
        PROGRAMS=processors(out.device),
        STAGES=_STAGES,
        num_warps=4,
        maxnreg=168,
    )


@functools.cache
def _tiles(size: int) -> int:
    """Return the number of tiles that touch the lower triangle of a matrix."""
    return sum(_ROWS * m // _COLUMNS + 1 for m in range(ceil_div(size, _ROWS)))
