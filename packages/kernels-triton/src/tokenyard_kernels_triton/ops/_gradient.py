"""The gradient through the activation, and sums over an expert's rows.

Every function allocates what it returns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenyard.activations import is_gated
from tokenyard.fp8 import DTYPE, Quantized
from tokenyard.interfaces import Plan
from tokenyard_kernels_triton._device import ceil_div, power_of_two
from tokenyard_kernels_triton.kernels import _fp8_gradient, _moves
from tokenyard_kernels_triton.kernels._activations import function_of
from tokenyard_kernels_triton.launching import launch
from tokenyard_kernels_triton.ops._moves import to_rows
from tokenyard_kernels_triton.ops._quantize import quantized_shapes
from tokenyard_kernels_triton.ops._row_tiles import RowTiles

_NARROW = 1280  # columns of an expert, up to which a program that quantizes is one warp


class DownBias(NamedTuple):
    """The bias of the down projection, and the rows that its gradient of topk_weights needs."""

    bias: Tensor  # [E, D]
    drows: Tensor  # [R, D], rows of dy


def copied_rows(
    dy: Tensor, plan: Plan, down_bias: Tensor | None, of_bias: bool, of_weights: bool
) -> tuple[Tensor | None, DownBias | None]:
    """Return rows of dy [R, D] if a gradient reads them one by one, and them with a bias.

    These gradients are that of the bias, and that of topk_weights where there is a bias. Matmuls
    may gather the rows instead.
    """
    bias = down_bias if of_weights else None
    if bias is None and not of_bias:
        return None, None
    rows = to_rows(dy, plan)
    return rows, None if bias is None else DownBias(bias, rows)


def differentiate(
    da: Tensor,
    z: Tensor,
    dz: Tensor,
    bias: DownBias | None,
    order: Tensor,
    topk_weights: Tensor | None,
    row_tiles: RowTiles,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Write dz [R, 2F or F]; return the weighted activation [R, F], and dots [R, 1 or 2].

    A row of dots sums to the gradient of the slot's weight. da = dy @ down [R, F] is not weighted.
    One pass reads da and z. dz may be z.
    """
    ffn_dim = da.shape[1]
    weighted, dots = _empty_results(da, bias, row_tiles)
    launch(_moves.differentiate, (row_tiles.rows,))(
        da,
        z,
        dz,
        weighted,
        dots,
        order,
        topk_weights,
        row_tiles.live,
        ffn_dim,
        dots.shape[1],
        **_constants(activation, topk_weights),
        # Each thread has columns of its own, so none reads a z that another has overwritten:
        # four warps have up to 256 threads, on AMD's GPUs.
        COLUMNS=max(256, min(2048, power_of_two(ffn_dim))),
    )
    if bias is not None:
        _write_bias_dots(dots, bias, row_tiles)
    return weighted, dots


def differentiate_and_quantize(
    da: Tensor,
    z: tuple[Tensor, Tensor | None],
    bias: DownBias | None,
    order: Tensor,
    topk_weights: Tensor | None,
    row_tiles: RowTiles,
    activation: str,
) -> tuple[Tensor, Quantized, Tensor, Tensor]:
    """Return dz, the same numbers in float8, and what `differentiate` returns.

    z is a tensor and None, or values in float8 and their scales.
    """
    dz = da.new_empty(z[0].shape)
    values, scales = quantized_shapes(da, *dz.shape)
    quantized = Quantized(values.view(DTYPE), scales)
    weighted, dots = _empty_results(da, bias, row_tiles)
    blocks = 2 if da.shape[1] <= _NARROW else 8
    launch(_fp8_gradient.differentiate_fp8, (row_tiles.rows,))(
        da,
        *z,
        dz,
        *quantized,
        weighted,
        dots,
        order,
        topk_weights,
        row_tiles.live,
        da.shape[1],
        dots.shape[1],
        **_constants(activation, topk_weights),
        BLOCKS=blocks,
        num_warps=blocks // 2,
    )
    if bias is not None:
        _write_bias_dots(dots, bias, row_tiles)
    return dz, quantized, weighted, dots


def _constants(activation: str, topk_weights: Tensor | None) -> dict[str, Any]:
    return {
        "FUNCTION": function_of(activation),
        "PARTS": 2 if is_gated(activation) else 1,
        "WEIGHTED": topk_weights is not None,
    }


def _empty_results(da: Tensor, bias: DownBias | None, row_tiles: RowTiles) -> tuple[Tensor, Tensor]:
    """Return undefined tensors for the weighted activation [R, F], and dots [R, 1 or 2]."""
    width = 1 if bias is None else 2
    return torch.empty_like(da), da.new_empty(row_tiles.rows, width, dtype=torch.float32)


def _write_bias_dots(dots: Tensor, bias: DownBias, row_tiles: RowTiles) -> None:
    """Write column 1 of dots [R, 2]: the dot products of rows of dy and their expert's bias."""
    down_bias, dy = bias
    tiles = row_tiles.tile_list(64, 16)
    launch(_moves.bias_dots, (row_tiles.bound(64),))(
        dy, down_bias, dots, tiles, dy.shape[1], dots.shape[1], 1, ROWS=64, COLUMNS=32
    )


def sum_rows(
    rows: Tensor, row_tiles: RowTiles, order: Tensor, topk_weights: Tensor | None
) -> Tensor:
    """Return [E, W]: the sum of each expert's rows [R, W], weighted if weights are given.

    It is zero for an expert without rows.
    """
    width = rows.shape[1]
    out = rows.new_empty(row_tiles.num_experts, width)
    launch(_moves.sum_rows, (row_tiles.num_experts, ceil_div(width, 64)))(
        rows,
        out,
        row_tiles.offsets,
        order,
        topk_weights,
        width,
        WEIGHTED=topk_weights is not None,
        ROWS=64,
        COLUMNS=64,
    )
    return out
