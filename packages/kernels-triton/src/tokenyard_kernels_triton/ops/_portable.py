"""Launches of the matmuls of an expert layer for any GPU; ``KernelSet`` describes the functions."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from tokenyard.activations import is_gated
from tokenyard.interfaces import Plan
from tokenyard_kernels_triton._device import (
    ceil_div,
    may_round_float32,
    processors,
    shared_memory,
)
from tokenyard_kernels_triton.gluon_tiling import Matmul
from tokenyard_kernels_triton.kernels import _portable
from tokenyard_kernels_triton.kernels._activations import function_of
from tokenyard_kernels_triton.launching import launch
from tokenyard_kernels_triton.ops._gradient import differentiate
from tokenyard_kernels_triton.ops._moves import to_rows
from tokenyard_kernels_triton.ops._row_tiles import RowTiles
from tokenyard_kernels_triton.portable_tiling import PortableTiling, portable_tiling

_ROUNDS = 32
"""Programs for each multiprocessor, at most: enough to balance their load."""

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def rows_of(tokens: Tensor, plan: Plan, ffn_dim: int) -> Tensor:
    """Return copies [R, D] of the rows of tokens [T, D], for experts of any width."""
    return to_rows(tokens, plan)


def up_and_activate(
    x: Tensor,
    up: Tensor,
    bias: Tensor | None,
    row_tiles: RowTiles,
    activation: str,
    keep_z: bool = True,
    keep_a: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return z [R, 2F or F] and a [R, F] of rows x [R, D]; one that is not kept is empty."""
    parts = 2 if is_gated(activation) else 1
    ffn_dim = up.shape[1] // parts
    z = x.new_empty(row_tiles.rows if keep_z else 0, up.shape[1])
    a = x.new_empty(row_tiles.rows if keep_a else 0, ffn_dim)
    tiling = _tiling(x, up, a)
    columns = tiling.columns // parts
    tiles = row_tiles.bound(tiling.rows) * ceil_div(ffn_dim, columns)
    programs = _most_programs(x)
    launch(_portable.up_and_activate, (min(tiles, programs),))(
        x,
        up,
        bias,
        z,
        a,
        row_tiles.tile_list(tiling.rows, tiling.group),
        x.shape[1],
        ffn_dim,
        FUNCTION=function_of(activation),
        PARTS=parts,
        BIAS=bias is not None,
        KEEP_Z=keep_z,
        KEEP_A=keep_a,
        PROGRAMS=programs,
        COLUMNS=columns,
        **_options(x, tiling),
    )
    return z, a


def times_weight(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_tiles: RowTiles,
    transposed: bool,
    matmul: Matmul,
) -> Tensor:
    """Return rows [R, M] @ weight [E, M, N], or [E, N, M] if transposed, plus bias [E, N]."""
    width = weight.shape[1 if transposed else 2]
    out = rows.new_empty(row_tiles.rows, width)
    tiling = _tiling(rows, weight)
    tiles = row_tiles.bound(tiling.rows) * ceil_div(width, tiling.columns)
    programs = _most_programs(rows)
    launch(_portable.times_weight, (min(tiles, programs),))(
        rows,
        weight,
        bias,
        out,
        row_tiles.tile_list(tiling.rows, tiling.group),
        rows.shape[1],
        width,
        TRANSPOSED=transposed,
        BIAS=bias is not None,
        PROGRAMS=programs,
        COLUMNS=tiling.columns,
        **_options(rows, tiling),
    )
    return out


def differentiate_down(
    drows: Tensor,
    down: Tensor,
    z: Tensor,
    dz: Tensor,
    order: Tensor,
    topk_weights: Tensor | None,
    row_tiles: RowTiles,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Write dz, which may be z; return the weighted activation [R, F], and dots [R, 1]."""
    da = times_weight(drows, down, None, row_tiles, False, "activation_gradient")
    return differentiate(da, z, dz, None, order, topk_weights, row_tiles, activation)


def weight_gradient(
    left: Tensor,
    right: Tensor,
    row_tiles: RowTiles,
    matmul: Matmul,
    *,
    total: Tensor | None = None,
) -> Tensor:
    """Return [E, M, N]: left [R, M] transposed @ right [R, N] over each expert's rows.

    With a total in float32, add to that and return it.
    """
    rows = left.shape[1]
    columns = right.shape[1]
    out = left.new_empty(row_tiles.num_experts, rows, columns) if total is None else total
    tiling = _tiling(left, right, of_weights=True)
    tiles = row_tiles.num_experts * ceil_div(rows, tiling.rows) * ceil_div(columns, tiling.columns)
    launch(_portable.weight_gradient, (tiles,))(
        left,
        right,
        out,
        row_tiles.offsets,
        row_tiles.largest_first(),
        rows,
        columns,
        ADD=total is not None,
        COLUMNS=tiling.columns,
        GROUP=tiling.group,
        **_options(left, tiling),
    )
    return out


def _most_programs(x: Tensor) -> int:
    """Return the most programs of a matmul whose number of tiles is known on the device only."""
    return _ROUNDS * processors(x.device)


def _tiling(*matrices: Tensor, of_weights: bool = False) -> PortableTiling:
    first = matrices[0]
    even = all(t.shape[-1] * t.element_size() % 16 == 0 for t in matrices)
    summed = first.shape[-1]  # not of gradients of weights
    return portable_tiling(first.dtype, shared_memory(first.device), even, summed, of_weights)


def _options(x: Tensor, tiling: PortableTiling) -> dict[str, Any]:
    return tiling.options() | number_options(x, tiling.precision)


def number_options(x: Tensor, precision: str = "ieee") -> dict[str, Any]:
    """Return the dtype and the precision of a kernel's matmuls, as its arguments.

    `precision` is that of float32, unless torch may round it to TF32.
    """
    full = x.dtype == torch.float32 and not may_round_float32()
    return {"PRECISION": precision if full else "tf32", "TYPE": _TYPES[x.dtype]}
