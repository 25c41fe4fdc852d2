"""The gradient through the activation, and sums over an expert's rows; every function allocates what it returns."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard.activations import is_gated
from tokenyard_kernels_triton._device import ceil_div, power_of_two
from tokenyard_kernels_triton.kernels import _moves
from tokenyard_kernels_triton.kernels._activations import FUNCTIONS
from tokenyard_kernels_triton.launching import launch
from tokenyard_kernels_triton.ops._row_tiles import RowTiles


def differentiate(
    da: Tensor,
    dy: Tensor | None,
    z: Tensor,
    down_bias: Tensor | None,
    order: Tensor,
    topk_weights: Tensor | None,
    layout: RowTiles,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dz [R, 2F or F], the weighted activation [R, F], and dots [R, .] that sum to a row's gate gradient.

    da' = dy @ down [R, F] is not weighted. One pass over da' and z. The rows dy [R, D] are needed for a bias alone.
    """
    ffn_dim = da.shape[1]
    dz, weighted = torch.empty_like(z), torch.empty_like(da)
    width = 1 if down_bias is None else 2
    dots = da.new_empty(layout.rows, width, dtype=torch.float32)
    launch(_moves.differentiate, (layout.rows,))(
        da,
        z,
        dz,
        weighted,
        dots,
        order,
        topk_weights,
        layout.live,
        ffn_dim,
        width,
        FUNCTION=FUNCTIONS.get(activation, activation),
        PARTS=2 if is_gated(activation) else 1,
        WEIGHTED=topk_weights is not None,
        COLUMNS=min(2048, power_of_two(ffn_dim)),
    )
    if dy is not None and down_bias is not None:
        dim = dy.shape[1]
        launch(_moves.bias_dots, (layout.bound(64),))(
            dy, down_bias, dots, layout.tiles(64, 16), dim, width, 1, ROWS=64, COLUMNS=32
        )
    return dz, weighted, dots


def sum_rows(rows: Tensor, layout: RowTiles, order: Tensor, topk_weights: Tensor | None) -> Tensor:
    """Return [E, W]: the sum of each expert's rows [R, W], weighted if weights are given; zero where it has none."""
    out = rows.new_empty(layout.num_experts, rows.shape[1])
    launch(_moves.sum_rows, (layout.num_experts, ceil_div(rows.shape[1], 64)))(
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
