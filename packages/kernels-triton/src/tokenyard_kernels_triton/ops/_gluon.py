"""Launching the products for Hopper; the functions are those of ``_portable``, and so is what they return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenyard.activations import is_gated
from tokenyard_kernels_triton._device import ceil_div, persistent_grid, processors
from tokenyard_kernels_triton.gluon_tiling import GluonTiling, Product, gluon_tiling
from tokenyard_kernels_triton.kernels import _gluon
from tokenyard_kernels_triton.kernels._activations import FUNCTIONS
from tokenyard_kernels_triton.launching import launch
from tokenyard_kernels_triton.ops._gluon_operands import Rows, operand, ragged, rows_of, stacked
from tokenyard_kernels_triton.ops._row_tiles import RowTiles

__all__ = ["rows_of", "times_weight", "up_and_activate", "weight_gradient"]

ROWS = 128  # of a tile
_REGISTERS = 168  # of a thread, at the start: two warpgroups and the loader's share 65536


def _options(device: torch.device, how: GluonTiling) -> dict[str, Any]:
    return how.options() | {"PROGRAMS": processors(device), "num_warps": 4, "maxnreg": _REGISTERS}


def up_and_activate(
    x: Rows,
    up: Tensor,
    bias: Tensor | None,
    layout: RowTiles,
    activation: str,
    keep_z: bool = True,
    keep_a: bool = True,
    how: GluonTiling | None = None,
) -> tuple[Tensor, Tensor]:
    """Return z [R, 2F or F] and a [R, F] of rows x [R, D]; one that is not kept is empty."""
    parts = 2 if is_gated(activation) else 1
    width = up.shape[1]
    ffn_dim = width // parts
    how = how or gluon_tiling("up", x.shape[1], ffn_dim, x.device)
    columns = how.columns // parts
    z = x.new_empty(layout.rows if keep_z else 0, width)
    a = x.new_empty(layout.rows if keep_a else 0, ffn_dim)
    described = a if keep_a else a.new_empty(1, ffn_dim)  # of nothing no descriptor can be made
    left, order, top_k = operand(x, (64, how.depth))
    launch(
        _gluon.up_and_activate,
        persistent_grid(x.device, layout.bound(ROWS) * ceil_div(ffn_dim, columns)),
    )(
        left,
        order,
        stacked(up, parts, (columns, how.depth)),
        bias,
        ragged(z, parts, (64, how.chunk)) if keep_z else None,
        ragged(described, 1, (64, how.chunk)),
        layout.tiles(ROWS, how.group),
        x.shape[1],
        ffn_dim,
        TOP_K=top_k,
        FUNCTION=FUNCTIONS.get(activation, activation),
        PARTS=parts,
        BIAS=bias is not None,
        KEEP_Z=keep_z,
        KEEP_A=keep_a,
        **_options(x.device, how),
    )
    return z, a


def times_weight(
    rows: Rows,
    weight: Tensor,
    bias: Tensor | None,
    layout: RowTiles,
    transposed: bool,
    product: Product,
    how: GluonTiling | None = None,
) -> Tensor:
    """Return rows [R, M] times each expert's weight [E, M, N], or [E, N, M] if transposed, plus bias [E, N]."""
    width = weight.shape[1 if transposed else 2]
    dim, ffn_dim = _widths(product, rows.shape[1], width)
    how = how or gluon_tiling(product, dim, ffn_dim, rows.device)
    out = rows.new_empty(layout.rows, width)
    block = (how.columns, how.depth) if transposed else (how.depth, how.columns)
    left, order, top_k = operand(rows, (64, how.depth))
    launch(
        _gluon.times_weight,
        persistent_grid(rows.device, layout.bound(ROWS) * ceil_div(width, how.columns)),
    )(
        left,
        order,
        stacked(weight, 1, block),
        bias,
        ragged(out, 1, (64, how.chunk)),
        layout.tiles(ROWS, how.group),
        rows.shape[1],
        width,
        TOP_K=top_k,
        B_BY_DEPTH=not transposed,
        BIAS=bias is not None,
        **_options(rows.device, how),
    )
    return out


def weight_gradient(
    left: Rows, right: Rows, layout: RowTiles, product: Product, how: GluonTiling | None = None
) -> Tensor:
    """Return [E, M, N]: over each expert's rows, left [R, M] transposed times right [R, N]; zero where it has none."""
    rows, columns = left.shape[1], right.shape[1]
    dim, ffn_dim = _widths(product, rows, columns)
    device = layout.offsets.device
    how = how or gluon_tiling(product, dim, ffn_dim, device)
    a, left_order, left_top_k = operand(left, (how.depth, 64))
    b, right_order, right_top_k = operand(right, (how.depth, how.columns))
    out = left.new_empty(layout.num_experts, rows, columns)
    each = ceil_div(rows, ROWS) * ceil_div(columns, how.columns)
    launch(_gluon.weight_gradient, persistent_grid(device, layout.num_experts * each))(
        a,
        b,
        right_order if left_order is None else left_order,
        stacked(out, 1, (64, how.chunk)),
        layout.offsets,
        layout.largest_first(),
        layout.num_experts,
        rows,
        columns,
        TOP_K=left_top_k or right_top_k,
        GATHER_LEFT=left_order is not None,
        GROUP=how.group,
        **_options(device, how),
    )
    return out


def _widths(product: Product, one: int, two: int) -> tuple[int, int]:
    """Return (dim, ffn_dim) of a product's two widths; gate and up together count as one width here."""
    return (two, one) if product in ("down", "input_gradient", "up_gradient") else (one, two)
