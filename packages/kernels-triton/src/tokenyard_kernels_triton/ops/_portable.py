"""Launching the products of an expert layer for any GPU; every function allocates what it returns.

``_gluon`` has the same functions, for Hopper, where tiles depend on the product.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from tokenyard.activations import is_gated
from tokenyard.interfaces import Plan
from tokenyard_kernels_triton._device import ceil_div, persistent_grid, processors, shared_memory
from tokenyard_kernels_triton.gluon_tiling import Product
from tokenyard_kernels_triton.kernels import _portable
from tokenyard_kernels_triton.kernels._activations import FUNCTIONS
from tokenyard_kernels_triton.launching import launch
from tokenyard_kernels_triton.ops._moves import to_rows
from tokenyard_kernels_triton.ops._row_tiles import RowTiles
from tokenyard_kernels_triton.portable_tiling import Tiling, portable_tiling

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def rows_of(tokens: Tensor, plan: Plan, ffn_dim: int) -> Tensor:
    """Return the rows of tokens [T, D] as an operand: copies [R, D], for experts of any width."""
    return to_rows(tokens, plan)


def up_and_activate(
    x: Tensor,
    up: Tensor,
    bias: Tensor | None,
    layout: RowTiles,
    activation: str,
    keep_z: bool = True,
    keep_a: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return z [R, 2F or F] and a [R, F] of rows x [R, D]; one that is not kept is empty."""
    parts = 2 if is_gated(activation) else 1
    width = up.shape[1]
    ffn_dim = width // parts
    z = x.new_empty(layout.rows if keep_z else 0, width)
    a = x.new_empty(layout.rows if keep_a else 0, ffn_dim)
    how = _tiling(x, up, a)
    columns = how.columns // parts
    launch(
        _portable.up_and_activate,
        persistent_grid(x.device, layout.bound(how.rows) * ceil_div(ffn_dim, columns)),
    )(
        x,
        up,
        bias,
        z,
        a,
        layout.tiles(how.rows, how.group),
        x.shape[1],
        ffn_dim,
        FUNCTION=FUNCTIONS.get(activation, activation),
        PARTS=parts,
        BIAS=bias is not None,
        KEEP_Z=keep_z,
        KEEP_A=keep_a,
        COLUMNS=columns,
        **_common(x, how),
    )
    return z, a


def times_weight(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: RowTiles,
    transposed: bool,
    product: Product,
) -> Tensor:
    """Return rows [R, M] times each expert's weight [E, M, N], or [E, N, M] if transposed, plus bias [E, N]."""
    width = weight.shape[1 if transposed else 2]
    out = rows.new_empty(layout.rows, width)
    how = _tiling(rows, weight)
    launch(
        _portable.times_weight,
        persistent_grid(rows.device, layout.bound(how.rows) * ceil_div(width, how.columns)),
    )(
        rows,
        weight,
        bias,
        out,
        layout.tiles(how.rows, how.group),
        rows.shape[1],
        width,
        TRANSPOSED=transposed,
        BIAS=bias is not None,
        COLUMNS=how.columns,
        **_common(rows, how),
    )
    return out


def weight_gradient(left: Tensor, right: Tensor, layout: RowTiles, product: Product) -> Tensor:
    """Return [E, M, N]: over each expert's rows, left [R, M] transposed times right [R, N]; zero where it has none."""
    rows, columns = left.shape[1], right.shape[1]
    out = left.new_empty(layout.num_experts, rows, columns)
    how = _tiling(left, right)
    each = ceil_div(rows, how.rows) * ceil_div(columns, how.columns)
    launch(_portable.weight_gradient, persistent_grid(left.device, layout.num_experts * each))(
        left,
        right,
        out,
        layout.offsets,
        layout.largest_first(),
        layout.num_experts,
        rows,
        columns,
        COLUMNS=how.columns,
        GROUP=how.group,
        **_common(left, how),
    )
    return out


def _tiling(*matrices: Tensor) -> Tiling:
    first = matrices[0]
    even = all(t.shape[-1] * t.element_size() % 16 == 0 for t in matrices)
    return portable_tiling(first.dtype, shared_memory(first.device), even)


def _common(x: Tensor, how: Tiling) -> dict[str, Any]:
    full = x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return how.options() | {
        "PROGRAMS": processors(x.device),
        "PRECISION": "ieee" if full else "tf32",
        "TYPE": _TYPES[x.dtype],
    }
