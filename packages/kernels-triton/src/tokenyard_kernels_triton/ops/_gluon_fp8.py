"""Launches of the matmuls in FP8 for Hopper GPUs, in Gluon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenyard.activations import is_gated
from tokenyard.fp8 import BLOCK, DTYPE, Quantized
from tokenyard.interfaces import Plan
from tokenyard_kernels_triton._device import ceil_div, persistent_grid, processors
from tokenyard_kernels_triton.kernels import _gluon_fp8_gradient, _gluon_fp8_rows, _gluon_fp8_up
from tokenyard_kernels_triton.kernels._activations import function_of
from tokenyard_kernels_triton.launching import launch
from tokenyard_kernels_triton.ops._gluon_operands import (
    are_gathered,
    operand,
    ragged,
    stacked,
)
from tokenyard_kernels_triton.ops._moves import to_rows
from tokenyard_kernels_triton.ops._quantize import QuantizedWeights, quantized_shapes
from tokenyard_kernels_triton.ops._row_tiles import RowTiles
from tokenyard_kernels_triton.ops._save import Save
from tokenyard_kernels_triton.ops._token_rows import Rows, TokenRows

ROWS = 128  # of a tile
COLUMNS = 256  # of a tile
_BOX = (64, BLOCK)  # of a left operand and of a result
_GROUP = 16  # row tiles that use a column tile of the weights while it is in cache
_REGISTERS = 168  # of a thread at launch, as in ``ops._gluon``


@dataclass(frozen=True)
class QuantizedRows:
    """Rows [R, W] in float8 sorted by expert, and scales of the rows, or of the tokens."""

    values: Rows
    scales: Tensor

    @property
    def device(self) -> torch.device:
        """The rows' device."""
        return self.scales.device


def rows_of(tokens: Quantized, plan: Plan, ffn_dim: int) -> QuantizedRows:
    """Return the rows of tokens [T, D] as an operand.

    They are copied, or gathered by the matmul if the experts are narrow.
    """
    values, scales = tokens
    if are_gathered(values, ffn_dim):
        return QuantizedRows(TokenRows(values, plan.order, plan.top_k), scales)
    copied = to_rows(values.view(torch.uint8), plan)
    return QuantizedRows(_as_fp8(copied), to_rows(scales, plan))


def sorted_rows(rows: Quantized) -> QuantizedRows:
    """Return rows [R, W] that are sorted by expert as an operand."""
    return QuantizedRows(*rows)


def up_and_activate(
    x: QuantizedRows,
    up: QuantizedWeights,
    bias: Tensor | None,
    row_tiles: RowTiles,
    activation: str,
    save: Save,
    dtype: torch.dtype,
    keep_a: bool = True,
) -> tuple[tuple[Tensor, Tensor], Quantized]:
    """Return what is saved of z [R, 2F or F], and a [R, F]; a is undefined unless it is kept.

    The first is z in float8 as bytes and its scales, or z in `dtype` and an empty tensor.
    """
    assert up.values is not None
    parts = 2 if is_gated(activation) else 1
    ffn_dim = up.values.shape[1] // parts
    z, z_scales = _empty_z(x, row_tiles.rows, parts * ffn_dim, save, dtype)
    # The kernel always needs a descriptor of `a`, and a descriptor needs a row.
    a = _empty_rows(x, row_tiles.rows if keep_a else 1, ffn_dim)
    tiles = row_tiles.bound(ROWS) * ceil_div(ffn_dim, COLUMNS // parts)
    launch(_gluon_fp8_up.up_and_activate_fp8, persistent_grid(x.device, tiles))(
        *_left(x),
        stacked(up.values, parts, (COLUMNS // parts, BLOCK)),
        up.scales,
        bias,
        None if save == "recompute" else ragged(_as_fp8(z), parts, _BOX),
        z_scales if save == "fp8" else None,
        ragged(a.values, 1, _BOX),
        a.scales,
        row_tiles.tile_list(ROWS, _GROUP),
        up.values.shape[2],
        ffn_dim,
        FUNCTION=function_of(activation),
        PARTS=parts,
        KEEP_Z=save != "recompute",
        KEEP_A=keep_a,
        **_options(x, bias, stages=3),
    )
    return (z, z_scales), a


def times_weight(
    rows: QuantizedRows,
    weight: QuantizedWeights,
    bias: Tensor | None,
    row_tiles: RowTiles,
    transposed: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Return rows [R, M] @ weight [E, M, N], or [E, N, M] if transposed, plus bias [E, N].

    The weight's layout with M last must exist.
    """
    values = weight.values if transposed else weight.transposed
    assert values is not None
    width, depth = values.shape[1:]
    next_column, next_slice = weight.scales.stride()[1:]
    if not transposed:
        next_column, next_slice = next_slice, next_column
    out = weight.scales.new_empty(row_tiles.rows, width, dtype=dtype)
    # As measured on an H200: the down matmul gains by a fourth slice, both gradients by a second
    # buffer for results.
    stages, buffers = (4, 1) if transposed else (3, 2)
    tiles = row_tiles.bound(ROWS) * ceil_div(width, COLUMNS)
    launch(_gluon_fp8_rows.times_weight_fp8, persistent_grid(rows.device, tiles))(
        *_left(rows),
        stacked(values, 1, (COLUMNS, BLOCK)),
        weight.scales,
        bias,
        ragged(out, 1, _BOX),
        row_tiles.tile_list(ROWS, _GROUP),
        depth,
        width,
        next_column,
        next_slice,
        BUFFERS=buffers,
        **_options(rows, bias, stages),
    )
    return out


def weight_gradient(
    left: Quantized, right: Quantized, row_tiles: RowTiles, dtype: torch.dtype
) -> Tensor:
    """Return [E, M, N]: left [M, .] @ right [N, .] transposed, over each expert's rows.

    Both operands are transposed rows, and `right` has square blocks.
    """
    rows, columns = left.values.shape[0], right.values.shape[0]
    device = left.scales.device
    out = left.scales.new_empty(row_tiles.num_experts, rows, columns, dtype=dtype)
    tiles = row_tiles.num_experts * (rows // ROWS) * ceil_div(columns, COLUMNS)
    launch(_gluon_fp8_gradient.weight_gradient_fp8, persistent_grid(device, tiles))(
        stacked(left.values.view(1, *left.values.shape), 1, _BOX),
        left.scales,
        stacked(right.values.view(1, *right.values.shape), 1, (COLUMNS, BLOCK)),
        right.scales,
        stacked(out, 1, _BOX),
        row_tiles.offsets,
        row_tiles.largest_first(),
        row_tiles.counter(),
        row_tiles.num_experts,
        rows,
        columns,
        left.scales.shape[1],
        CHUNK=BLOCK,
        GROUP=_GROUP,
        PROGRAMS=processors(device),
        STAGES=4,
        BUFFERS=1,
        num_warps=4,
        maxnreg=_REGISTERS,
    )
    return out


def _left(rows: QuantizedRows) -> tuple[Any, Tensor, Tensor | None]:
    """Return a kernel's arguments for its left operand: rows or tokens, scales, and order."""
    left, order, _ = operand(rows.values, _BOX)
    return left, rows.scales, order


def _options(rows: QuantizedRows, bias: Tensor | None, stages: int) -> dict[str, Any]:
    return {
        "TOP_K": rows.values.top_k if isinstance(rows.values, TokenRows) else 0,
        "BIAS": bias is not None,
        "PROGRAMS": processors(rows.device),
        "STAGES": stages,
        "num_warps": 4,
        "maxnreg": _REGISTERS,
    }


def _empty_rows(x: QuantizedRows, rows: int, width: int) -> Quantized:
    values, scales = quantized_shapes(x.scales, rows, width)
    return Quantized(_as_fp8(values), scales)


def _empty_z(
    x: QuantizedRows, rows: int, width: int, save: Save, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if save == "fp8":
        return quantized_shapes(x.scales, rows, width)
    kept = 0 if save == "recompute" else rows
    return x.scales.new_empty(kept, width, dtype=dtype), x.scales.new_empty(0, dtype=dtype)


def _as_fp8(values: Tensor) -> Tensor:
    """Return bytes as numbers in float8, and any other tensor unchanged."""
    return values.view(DTYPE) if values.dtype == torch.uint8 else values
