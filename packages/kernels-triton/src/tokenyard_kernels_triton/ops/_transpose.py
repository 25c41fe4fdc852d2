"""Launches of the transposition of rows to float8."""

from __future__ import annotations

import torch

from tokenyard.fp8 import BLOCK, DTYPE, Quantized
from tokenyard_kernels_triton.kernels import _transpose
from tokenyard_kernels_triton.launching import launch
from tokenyard_kernels_triton.ops._row_tiles import RowTiles
from tokenyard_kernels_triton.ops._token_rows import Rows, operand


def transpose_rows(rows: Rows, row_tiles: RowTiles, square: bool) -> Quantized:
    """Return rows [R, W] in float8, transposed to [W, B * 128]; B is R / 128 + E, rounded down.

    Scales are [W, B], or [W / 128, B] of 128 x 128 numbers if `square`.
    """
    width = rows.shape[1]
    blocks = row_tiles.rows // BLOCK + row_tiles.num_experts
    source, order, top_k = operand(rows)
    values = row_tiles.offsets.new_empty(width, blocks * BLOCK, dtype=DTYPE)
    scales = row_tiles.offsets.new_empty(
        width // BLOCK if square else width, blocks, dtype=torch.float32
    )
    launch(_transpose.transpose_rows, (row_tiles.bound(BLOCK), width // BLOCK))(
        source,
        order,
        values,
        scales,
        row_tiles.offsets,
        row_tiles.tile_list(BLOCK, 16),
        width,
        blocks,
        TOP_K=top_k,
        SQUARE=square,
        num_warps=8,
        maxnreg=64 if square else 80,  # so that more programs hide each other's waits
    )
    return Quantized(values, scales)
