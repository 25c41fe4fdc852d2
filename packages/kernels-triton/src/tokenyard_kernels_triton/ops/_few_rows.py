"""Launches of the matmuls for few rows an expert; ``KernelSet`` describes the functions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokenyard.activations import is_gated
from tokenyard.interfaces import Plan
from tokenyard_kernels_triton._device import ceil_div, chained, power_of_two
from tokenyard_kernels_triton.few_rows_tiling import (
    GRADIENT_TILING,
    FewRowsTiling,
    few_rows_tiling,
)
from tokenyard_kernels_triton.gluon_tiling import Matmul
from tokenyard_kernels_triton.kernels import _few_rows
from tokenyard_kernels_triton.kernels._activations import function_of
from tokenyard_kernels_triton.launching import launch
from tokenyard_kernels_triton.ops._portable import number_options
from tokenyard_kernels_triton.ops._row_tiles import RowTiles
from tokenyard_kernels_triton.ops._token_rows import Rows, TokenRows, operand

_MOST_COLUMNS = 64  # in `differentiate_down`, whose epilogue has no registers for wider tiles


def rows_of(tokens: Tensor, plan: Plan, ffn_dim: int) -> Rows:
    """Return the rows of tokens [T, D] as an operand, which the matmuls gather."""
    return TokenRows(tokens, plan.order, plan.top_k)


def up_and_activate(
    x: Rows,
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
    tiling = few_rows_tiling(row_tiles.rows, row_tiles.num_experts)
    columns = tiling.columns // parts
    matrix, order, top_k = operand(x)
    launch(_few_rows.up_and_activate_few, _grid(row_tiles, tiling, ffn_dim, columns))(
        matrix,
        order,
        up,
        bias,
        z,
        a,
        row_tiles.offsets,
        row_tiles.num_experts,
        x.shape[1],
        ffn_dim,
        TOP_K=top_k,
        FUNCTION=function_of(activation),
        PARTS=parts,
        BIAS=bias is not None,
        KEEP_Z=keep_z,
        KEEP_A=keep_a,
        COLUMNS=columns,
        **_options(matrix, row_tiles, tiling),
    )
    return z, a


def times_weight(
    rows: Rows,
    weight: Tensor,
    bias: Tensor | None,
    row_tiles: RowTiles,
    transposed: bool,
    matmul: Matmul,
) -> Tensor:
    """Return rows [R, M] @ weight [E, M, N], or [E, N, M] if transposed, plus bias [E, N]."""
    width = weight.shape[1 if transposed else 2]
    out = rows.new_empty(row_tiles.rows, width)
    tiling = few_rows_tiling(row_tiles.rows, row_tiles.num_experts)
    matrix, order, top_k = operand(rows)
    launch(_few_rows.times_weight_few, _grid(row_tiles, tiling, width, tiling.columns))(
        matrix,
        order,
        weight,
        bias,
        out,
        row_tiles.offsets,
        row_tiles.num_experts,
        rows.shape[1],
        width,
        TOP_K=top_k,
        TRANSPOSED=transposed,
        BIAS=bias is not None,
        COLUMNS=tiling.columns,
        **_options(matrix, row_tiles, tiling),
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
    """Write dz, which may be z; return the weighted activation [R, F], and dots [R, some]."""
    dim, ffn_dim = down.shape[1:]
    tiling = few_rows_tiling(row_tiles.rows, row_tiles.num_experts)
    if tiling.columns > _MOST_COLUMNS:
        tiling = replace(tiling, columns=_MOST_COLUMNS, stages=tiling.stages + 1)
    matrix, _, top_k = operand(drows)
    weighted = z.new_empty(row_tiles.rows, ffn_dim)
    columns = ceil_div(ffn_dim, tiling.columns)
    dots = z.new_empty(row_tiles.rows, columns, dtype=torch.float32)
    launch(_few_rows.differentiate_down_few, _grid(row_tiles, tiling, ffn_dim, tiling.columns))(
        matrix,
        down,
        z,
        dz,
        weighted,
        dots,
        order,
        topk_weights,
        row_tiles.offsets,
        row_tiles.num_experts,
        dim,
        ffn_dim,
        TOP_K=top_k,
        WEIGHTED=topk_weights is not None,
        FUNCTION=function_of(activation),
        PARTS=2 if is_gated(activation) else 1,
        COLUMNS=tiling.columns,
        **_options(matrix, row_tiles, tiling),
    )
    return weighted, dots


def weight_gradient(
    left: Rows,
    right: Rows,
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
    a, left_order, left_top_k = operand(left)
    b, right_order, right_top_k = operand(right)
    options = GRADIENT_TILING.options()
    options["STAGES"] = options.pop("num_stages")
    tiles = row_tiles.num_experts * ceil_div(rows, GRADIENT_TILING.rows)
    launch(_few_rows.weight_gradient_few, (tiles,))(
        a,
        b,
        left_order,
        right_order,
        out,
        row_tiles.offsets,
        rows,
        columns,
        ADD=total is not None,
        TOP_K=left_top_k or right_top_k,
        COLUMNS=GRADIENT_TILING.columns,
        **options,
        **number_options(a),
    )
    return out


def _grid(row_tiles: RowTiles, tiling: FewRowsTiling, width: int, columns: int) -> tuple[int]:
    # Each tile has a row.
    tiles = min(row_tiles.rows, row_tiles.bound(tiling.rows))
    return (tiles * ceil_div(width, columns),)


def _options(x: Tensor, row_tiles: RowTiles, tiling: FewRowsTiling) -> dict[str, Any]:
    experts = {"EXPERTS": power_of_two(row_tiles.num_experts)}
    return tiling.options() | experts | chained(x.device) | number_options(x)
