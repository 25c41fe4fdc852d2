"""Launches of the matmuls for Hopper GPUs, in Gluon; ``KernelSet`` describes the functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenyard.activations import is_gated
from tokenyard_kernels_triton._device import ceil_div, persistent_grid, processors
from tokenyard_kernels_triton.gluon_tiling import GluonTiling, Matmul, gluon_tiling
from tokenyard_kernels_triton.kernels import (
    _gluon_columns,
    _gluon_differentiate,
    _gluon_rows,
    _gluon_up,
)
from tokenyard_kernels_triton.kernels._activations import function_of
from tokenyard_kernels_triton.launching import launch
from tokenyard_kernels_triton.ops._gluon_operands import operand, ragged, rows_of, stacked
from tokenyard_kernels_triton.ops._row_tiles import RowTiles
from tokenyard_kernels_triton.ops._token_rows import Rows, TokenRows

__all__ = ["differentiate_down", "rows_of", "times_weight", "up_and_activate", "weight_gradient"]

ROWS = 128  # of a tile

# Of a thread at launch: two warp groups and the loader then share 65536 registers.
_REGISTERS = 168

# Activations whose up matmul spills registers with tiles of 256 columns, and their tile.
_COSTLY = ("gelu", "gelu_tanh")
_OF_COSTLY = GluonTiling(4, 64, 2, columns=128, group=16)

# Of `differentiate_down`: columns at a time, chunks of the pre-activation loaded ahead (RING), and
# buffers of results. They fill its shared memory.
_DIFFERENTIATE = {"STAGES": 3, "CHUNK": 32, "RING": 2, "BUFFERS": 2}


def _options(device: torch.device, tiling: GluonTiling) -> dict[str, Any]:
    programs = {"PROGRAMS": processors(device), "num_warps": 4, "maxnreg": _REGISTERS}
    return tiling.options() | programs


def up_and_activate(
    x: Rows,
    up: Tensor,
    bias: Tensor | None,
    row_tiles: RowTiles,
    activation: str,
    keep_z: bool = True,
    keep_a: bool = True,
    tiling: GluonTiling | None = None,
) -> tuple[Tensor, Tensor]:
    """Return z [R, 2F or F] and a [R, F] of rows x [R, D]; one that is not kept is empty."""
    parts = 2 if is_gated(activation) else 1
    ffn_dim = up.shape[1] // parts
    tiling = tiling or _up_tiling(x, ffn_dim, activation)
    columns = tiling.columns // parts
    z = x.new_empty(row_tiles.rows if keep_z else 0, up.shape[1])
    a = x.new_empty(row_tiles.rows if keep_a else 0, ffn_dim)
    left, order, top_k = operand(x, (64, tiling.depth))
    tiles = row_tiles.bound(ROWS) * ceil_div(ffn_dim, columns)
    launch(_gluon_up.up_and_activate, persistent_grid(x.device, tiles))(
        left,
        order,
        stacked(up, parts, (columns, tiling.depth)),
        bias,
        ragged(z, parts, (64, tiling.chunk)) if keep_z else None,
        # The kernel always needs a descriptor of `a`, and a descriptor needs a row.
        ragged(a if keep_a else a.new_empty(1, ffn_dim), 1, (64, tiling.chunk)),
        row_tiles.tile_list(ROWS, tiling.group),
        x.shape[1],
        ffn_dim,
        TOP_K=top_k,
        FUNCTION=function_of(activation),
        PARTS=parts,
        BIAS=bias is not None,
        KEEP_Z=keep_z,
        KEEP_A=keep_a,
        **_options(x.device, tiling),
    )
    return z, a


def _up_tiling(x: Rows, ffn_dim: int, activation: str) -> GluonTiling:
    if activation in _COSTLY:
        return _OF_COSTLY
    return gluon_tiling("up", x.shape[1], ffn_dim, x.device)


def times_weight(
    rows: Rows,
    weight: Tensor,
    bias: Tensor | None,
    row_tiles: RowTiles,
    transposed: bool,
    matmul: Matmul,
    tiling: GluonTiling | None = None,
) -> Tensor:
    """Return rows [R, M] @ weight [E, M, N], or [E, N, M] if transposed, plus bias [E, N]."""
    width = weight.shape[1 if transposed else 2]
    dim, ffn_dim = _widths(matmul, rows.shape[1], width)
    tiling = tiling or gluon_tiling(matmul, dim, ffn_dim, rows.device)
    box = (tiling.columns, tiling.depth) if transposed else (tiling.depth, tiling.columns)
    out = rows.new_empty(row_tiles.rows, width)
    left, order, top_k = operand(rows, (64, tiling.depth))
    tiles = row_tiles.bound(ROWS) * ceil_div(width, tiling.columns)
    launch(_gluon_rows.times_weight, persistent_grid(rows.device, tiles))(
        left,
        order,
        stacked(weight, 1, box),
        bias,
        ragged(out, 1, (64, tiling.chunk)),
        row_tiles.tile_list(ROWS, tiling.group),
        rows.shape[1],
        width,
        TOP_K=top_k,
        B_BY_DEPTH=not transposed,
        BIAS=bias is not None,
        **_options(rows.device, tiling),
    )
    return out


def differentiate_down(
    drows: Rows,
    down: Tensor,
    z: Tensor,
    dz: Tensor,
    order: Tensor,
    topk_weights: Tensor | None,
    row_tiles: RowTiles,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Write dz, which may be z; return the weighted activation, and dots [R, ceil(F / 256)]."""
    parts = 2 if is_gated(activation) else 1
    dim, ffn_dim = down.shape[1:]
    tiling = gluon_tiling("activation_gradient", dim, ffn_dim, drows.device)
    columns = ceil_div(ffn_dim, tiling.columns)
    box = (64, _DIFFERENTIATE["CHUNK"])
    weighted = drows.new_empty(row_tiles.rows, ffn_dim)
    dots = torch.empty(row_tiles.rows, columns, dtype=torch.float32, device=z.device)
    left, _, top_k = operand(drows, (64, tiling.depth))
    grid = persistent_grid(drows.device, row_tiles.bound(ROWS) * columns)
    launch(_gluon_differentiate.differentiate_down, grid)(
        left,
        order,
        topk_weights,
        stacked(down, 1, (tiling.depth, tiling.columns)),
        ragged(z, parts, box),
        ragged(dz, parts, box),
        ragged(weighted, 1, box),
        dots,
        row_tiles.tile_list(ROWS, tiling.group),
        dim,
        ffn_dim,
        FUNCTION=function_of(activation),
        PARTS=parts,
        WEIGHTED=topk_weights is not None,
        TOP_K=top_k,
        **_options(drows.device, tiling) | _DIFFERENTIATE,
    )
    return weighted, dots


def weight_gradient(
    left: Rows,
    right: Rows,
    row_tiles: RowTiles,
    matmul: Matmul,
    tiling: GluonTiling | None = None,
    *,
    total: Tensor | None = None,
) -> Tensor:
    """Return [E, M, N]: left [R, M] transposed @ right [R, N] over each expert's rows.

    With a total in float32, add to that and return it.
    """
    shape = (row_tiles.num_experts, left.shape[1], right.shape[1])
    out = left.new_empty(*shape) if total is None else total
    device = row_tiles.offsets.device
    tiling = tiling or gluon_tiling(matmul, *_widths(matmul, *shape[1:]), device)
    chunk = tiling.chunk if total is None else tiling.chunk // 2  # as many bytes

    # An operand that is gathered is the left one, whose boxes are half as wide.
    by_columns = isinstance(right, TokenRows)
    if by_columns:
        left, right = right, left
    rows, columns = left.shape[1], right.shape[1]
    tiles = shape[0] * ceil_div(rows, ROWS) * ceil_div(columns, tiling.columns)
    a, order, top_k = operand(left, (tiling.depth, 64))
    launch(_gluon_columns.weight_gradient, persistent_grid(device, tiles))(
        *(a, operand(right, (tiling.depth, tiling.columns))[0], order),
        stacked(out, 1, (chunk, 64) if by_columns else (64, chunk)),
        *(row_tiles.offsets, row_tiles.largest_first(), row_tiles.counter()),
        *(shape[0], rows, columns),
        OUT_BY_COLUMNS=by_columns,
        ADD=total is not None,
        TOP_K=top_k,
        GROUP=tiling.group,
        **_options(device, tiling) | {"CHUNK": chunk},
    )
    return out


def _widths(matmul: Matmul, one: int, two: int) -> tuple[int, int]:
    """Return which of a matmul's widths is (dim, ffn_dim); gate and up count as one width."""
    return (two, one) if matmul in ("down", "input_gradient", "up_gradient") else (one, two)
