"""Launching the products for Hopper; the functions are those of ``_portable``, and so is what they return."""

from __future__ import annotations

import functools
from typing import Any

import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tokenyard.activations import is_gated
from tokenyard_kernels_triton._device import ceil_div, persistent_grid, processors
from tokenyard_kernels_triton.hopper_tiling import HopperTiling, Product, hopper_tiling
from tokenyard_kernels_triton.kernels import _hopper
from tokenyard_kernels_triton.kernels._activations import FUNCTIONS
from tokenyard_kernels_triton.ops._layout import Layout

ROWS = 128  # of a tile
_REGISTERS = 168  # of a thread, at the start: two warpgroups and the loader's share 65536
_RAGGED_ROWS = 1 << 30  # more than a ragged matrix has
_MANY = 0x7FFF0000
_WRAP = 1 << 34  # times _RAGGED_ROWS, it is a multiple of 2^64


def _ragged(rows: Tensor, parts: int, block: tuple[int, int]) -> TensorDescriptor:
    """Describe rows [R, parts * W], for boxes of `block` rows and columns of one part that end with their expert."""
    width, box = rows.shape[1], [1, 1, block[0], 1, block[1]]
    shape = [_MANY, _MANY, _RAGGED_ROWS, parts, width // parts]
    strides = [_WRAP - width, width, width, width // parts, 1]
    return TensorDescriptor(rows, shape, strides, box, _layout(box, rows))


def _stacked(weights: Tensor, parts: int, block: tuple[int, int]) -> TensorDescriptor:
    """Describe weights [E, parts * M, N], for boxes of `block` rows of each part and columns."""
    experts, rows, columns = weights.shape
    box = [1, parts, *block]
    split = weights.view(experts, parts, rows // parts, columns)
    return TensorDescriptor.from_tensor(split, box, _layout(box, weights))


def _layout(box: list[int], like: Tensor) -> gl.NVMMASharedLayout:
    size = like.element_size()
    return _shared_layout(min(128, box[-1] * size), 8 * size, len(box))


@functools.cache  # a layout takes longer to make than a launch
def _shared_layout(swizzle: int, bits: int, rank: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle, bits, rank=rank)


def _options(x: Tensor, how: HopperTiling) -> dict[str, Any]:
    return how.options() | {"PROGRAMS": processors(x.device), "num_warps": 4, "maxnreg": _REGISTERS}


def up_and_activate(
    x: Tensor,
    up: Tensor,
    bias: Tensor | None,
    layout: Layout,
    activation: str,
    keep_z: bool = True,
    keep_a: bool = True,
    how: HopperTiling | None = None,
) -> tuple[Tensor, Tensor]:
    """Return z [R, 2F or F] and a [R, F] of rows x [R, D]; one that is not kept is empty."""
    parts = 2 if is_gated(activation) else 1
    width = up.shape[1]
    ffn_dim = width // parts
    how = how or hopper_tiling("up", x.shape[1], ffn_dim, x.device)
    columns = how.columns // parts
    z = x.new_empty(layout.rows if keep_z else 0, width)
    a = x.new_empty(layout.rows if keep_a else 0, ffn_dim)
    _hopper.up_and_activate[persistent_grid(x.device, layout.bound(ROWS) * ceil_div(ffn_dim, columns))](
        _ragged(x, 1, (64, how.depth)),
        _stacked(up, parts, (columns, how.depth)),
        bias,
        _ragged(z, parts, (64, how.chunk)) if keep_z else None,
        _ragged(a, 1, (64, how.chunk)),
        layout.tiles(ROWS, how.group),
        x.shape[1],
        ffn_dim,
        FUNCTION=FUNCTIONS.get(activation, activation),
        PARTS=parts,
        BIAS=bias is not None,
        KEEP_Z=keep_z,
        KEEP_A=keep_a,
        **_options(x, how),
    )
    return z, a


def times_weight(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    transposed: bool,
    product: Product,
    how: HopperTiling | None = None,
) -> Tensor:
    """Return rows [R, M] times each expert's weight [E, M, N], or [E, N, M] if transposed, plus bias [E, N]."""
    width = weight.shape[1 if transposed else 2]
    dim, ffn_dim = _widths(product, rows.shape[1], width)
    how = how or hopper_tiling(product, dim, ffn_dim, rows.device)
    out = rows.new_empty(layout.rows, width)
    block = (how.columns, how.depth) if transposed else (how.depth, how.columns)
    _hopper.times_weight[persistent_grid(rows.device, layout.bound(ROWS) * ceil_div(width, how.columns))](
        _ragged(rows, 1, (64, how.depth)),
        _stacked(weight, 1, block),
        bias,
        _ragged(out, 1, (64, how.chunk)),
        layout.tiles(ROWS, how.group),
        rows.shape[1],
        width,
        B_BY_DEPTH=not transposed,
        BIAS=bias is not None,
        **_options(rows, how),
    )
    return out


def weight_gradient(
    left: Tensor, right: Tensor, layout: Layout, product: Product, how: HopperTiling | None = None
) -> Tensor:
    """Return [E, M, N]: over each expert's rows, left [R, M] transposed times right [R, N]; zero where it has none."""
    rows, columns = left.shape[1], right.shape[1]
    dim, ffn_dim = _widths(product, rows, columns)
    how = how or hopper_tiling(product, dim, ffn_dim, left.device)
    out = left.new_empty(layout.num_experts, rows, columns)
    each = ceil_div(rows, ROWS) * ceil_div(columns, how.columns)
    _hopper.weight_gradient[persistent_grid(left.device, layout.num_experts * each)](
        _ragged(left, 1, (how.depth, 64)),
        _ragged(right, 1, (how.depth, how.columns)),
        _stacked(out, 1, (64, how.chunk)),
        layout.offsets,
        layout.largest_first(),
        layout.num_experts,
        rows,
        columns,
        GROUP=how.group,
        **_options(left, how),
    )
    return out


def _widths(product: Product, one: int, two: int) -> tuple[int, int]:
    """Return (dim, ffn_dim) of a product's two widths; gate and up together count as one width here."""
    return (two, one) if product in ("down", "input_gradient", "up_gradient") else (one, two)
