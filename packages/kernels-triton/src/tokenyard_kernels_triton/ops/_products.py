"""Launching the products of an expert layer; every function allocates what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton.language as tl
from tokenyard.activations import is_gated
from torch import Tensor

from tokenyard_kernels_triton._device import ceil_div, has_copy_engine, power_of_two, processors
from tokenyard_kernels_triton.kernels import _moves, _products, _schedule
from tokenyard_kernels_triton.kernels._activations import FUNCTIONS
from tokenyard_kernels_triton.kernels._tiles import describable, ragged, stacked
from tokenyard_kernels_triton.tiling import Product, Tiling, tiling

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass
class Layout:
    """The rows of a plan, and their tile lists, made once for each tile size."""

    offsets: Tensor  # [E + 1]
    rows: int  # R
    _lists: dict[int, Tensor] = field(default_factory=dict)
    by_rows: Tensor | None = None  # [E] int32: experts, those with most rows first

    @property
    def num_experts(self) -> int:
        """E."""
        return self.offsets.shape[0] - 1

    @property
    def live(self) -> Tensor:
        """[1]: how many rows there are before the tail."""
        return self.offsets[-1:]

    def bound(self, tile: int) -> int:
        """Return how many tiles of so many rows there are at most."""
        return ceil_div(self.rows, tile) + self.num_experts

    def tiles(self, tile: int) -> Tensor:
        """Return the list of tiles of so many rows; see ``kernels._schedule``."""
        if tile not in self._lists:
            self._lists[tile] = self.offsets.new_empty(1 + 3 * self.bound(tile))
            self.by_rows = self.offsets.new_empty(self.num_experts)
            _schedule.list_tiles[(self.num_experts,)](
                self.offsets,
                self._lists[tile],
                self.by_rows,
                self.num_experts,
                TILE=tile,
                EXPERTS=power_of_two(self.num_experts),
                CHUNK=128,
                num_warps=1,
            )
        return self._lists[tile]

    def largest_first(self) -> Tensor:
        """Return the experts by falling number of rows."""
        if self.by_rows is None:
            self.tiles(128)
        assert self.by_rows is not None
        return self.by_rows


def up_and_activate(
    x: Tensor, up: Tensor, bias: Tensor | None, layout: Layout, activation: str, keep_z: bool = True, keep_a: bool = True
) -> tuple[Tensor, Tensor]:
    """Return z [R, 2F or F] and a [R, F] of rows x [R, D]; one that is not kept is empty."""
    parts = 2 if is_gated(activation) else 1
    width = up.shape[1]
    ffn_dim = width // parts
    z = x.new_empty(layout.rows if keep_z else 0, width)
    a = x.new_empty(layout.rows if keep_a else 0, ffn_dim)
    tma = _tma(x, up, z[:, :ffn_dim], a)
    how = tiling("up", x.dtype, tma)
    columns = how.columns // parts
    _products.up_and_activate[_grid(x, layout.bound(how.rows) * ceil_div(ffn_dim, columns))](
        ragged(x, 1, (how.rows, how.depth), tma),
        stacked(up, parts, (columns, how.depth), tma),
        bias,
        ragged(z, parts, (how.rows, columns), tma) if keep_z else None,
        ragged(a, 1, (how.rows, columns), tma) if keep_a else None,
        layout.tiles(how.rows),
        x.shape[1],
        ffn_dim,
        FUNCTION=FUNCTIONS.get(activation, activation),
        PARTS=parts,
        BIAS=bias is not None,
        KEEP_Z=keep_z,
        KEEP_A=keep_a,
        COLUMNS=columns,
        **_common(x, how, tma),
    )
    return z, a


def times_weight(
    rows: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, transposed: bool, product: Product
) -> Tensor:
    """Return rows [R, M] times each expert's weight [E, M, N], or [E, N, M] if transposed, plus bias [E, N]."""
    width = weight.shape[1 if transposed else 2]
    out = rows.new_empty(layout.rows, width)
    tma = _tma(rows, weight, out)
    how = tiling(product, rows.dtype, tma)
    block = (how.columns, how.depth) if transposed else (how.depth, how.columns)
    _products.times_weight[_grid(rows, layout.bound(how.rows) * ceil_div(width, how.columns))](
        ragged(rows, 1, (how.rows, how.depth), tma),
        stacked(weight, 1, block, tma),
        bias,
        ragged(out, 1, (how.rows, how.columns), tma),
        layout.tiles(how.rows),
        rows.shape[1],
        width,
        TRANSPOSED=transposed,
        BIAS=bias is not None,
        COLUMNS=how.columns,
        **_common(rows, how, tma),
    )
    return out


def activation_gradient(
    dy: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    z: Tensor,
    order: Tensor,
    topk_weights: Tensor | None,
    layout: Layout,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dz [R, 2F or F], the weighted activation [R, F], and dots [R, .] that sum to a row's gate gradient."""
    parts = 2 if is_gated(activation) else 1
    dim, ffn_dim = down.shape[1:]
    dz, weighted = torch.empty_like(z), dy.new_empty(layout.rows, ffn_dim)
    tma = _tma(dy, down, z[:, :ffn_dim], weighted)
    how = tiling("activation_gradient", dy.dtype, tma)
    tiles = ceil_div(ffn_dim, how.columns)
    width = tiles + (down_bias is not None)
    dots = dy.new_empty(layout.rows, width, dtype=torch.float32)
    piece = (how.rows, how.columns // how.pieces)
    _products.activation_gradient[_grid(dy, layout.bound(how.rows) * tiles)](
        ragged(dy, 1, (how.rows, how.depth), tma),
        stacked(down, 1, (how.depth, how.columns), tma),
        ragged(z, parts, piece, tma),
        ragged(dz, parts, piece, tma),
        ragged(weighted, 1, piece, tma),
        dots,
        order,
        topk_weights,
        layout.tiles(how.rows),
        dim,
        ffn_dim,
        width,
        FUNCTION=FUNCTIONS.get(activation, activation),
        PARTS=parts,
        WEIGHTED=topk_weights is not None,
        PIECES=how.pieces,
        COLUMNS=how.columns,
        **_common(dy, how, tma),
    )
    if down_bias is not None:
        _moves.bias_dots[(layout.bound(how.rows),)](
            dy, down_bias, dots, layout.tiles(how.rows), dim, width, tiles, ROWS=how.rows, COLUMNS=32
        )
    return dz, weighted, dots


def weight_gradient(left: Tensor, right: Tensor, layout: Layout, product: Product) -> Tensor:
    """Return [E, M, N]: over each expert's rows, left [R, M] transposed times right [R, N]; zero where it has none."""
    rows, columns = left.shape[1], right.shape[1]
    out = left.new_empty(layout.num_experts, rows, columns)
    tma = _tma(left, right, out)
    how = tiling(product, left.dtype, tma)
    each = ceil_div(rows, how.rows) * ceil_div(columns, how.columns)
    _products.weight_gradient[_grid(left, layout.num_experts * each)](
        ragged(left, 1, (how.depth, how.rows), tma),
        ragged(right, 1, (how.depth, how.columns), tma),
        stacked(out, 1, (how.rows, how.columns), tma),
        layout.offsets,
        layout.largest_first(),
        layout.num_experts,
        rows,
        columns,
        COLUMNS=how.columns,
        **_common(left, how, tma),
    )
    return out


def sum_rows(rows: Tensor, layout: Layout, order: Tensor, topk_weights: Tensor | None) -> Tensor:
    """Return [E, W]: the sum of each expert's rows [R, W], weighted if weights are given."""
    out = rows.new_empty(layout.num_experts, rows.shape[1])
    _moves.sum_rows[(layout.num_experts, ceil_div(rows.shape[1], 64))](
        rows,
        out,
        layout.offsets,
        order,
        topk_weights,
        rows.shape[1],
        WEIGHTED=topk_weights is not None,
        ROWS=64,
        COLUMNS=64,
    )
    return out


def _tma(*matrices: Tensor) -> bool:
    return has_copy_engine(matrices[0].device) and describable(*matrices)


def _grid(x: Tensor, tiles: int) -> tuple[int]:
    return (min(processors(x.device), tiles),)


def _common(x: Tensor, how: Tiling, tma: bool) -> dict[str, Any]:
    full = x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return how.options() | {
        "PROGRAMS": processors(x.device),
        "TMA": tma,
        "PRECISION": "ieee" if full else "tf32",
        "TYPE": _TYPES[x.dtype],
    }
