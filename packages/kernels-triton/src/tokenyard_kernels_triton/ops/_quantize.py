"""Launches of the conversions to fewer bits and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenyard.fp8 import BLOCK, DTYPE, Quantized
from tokenyard_kernels_triton._device import ceil_div, power_of_two
from tokenyard_kernels_triton.kernels import _quantize
from tokenyard_kernels_triton.launching import launch

_ROWS = 32


class QuantizedWeights(NamedTuple):
    """Weights [E, M, N] in float8, for matmuls along N, along M, or both."""

    values: Tensor | None  # [E, M, N] float8_e4m3fn
    transposed: Tensor | None  # [E, N, M] float8_e4m3fn
    scales: Tensor  # [E, M / 128, N / 128] float32


def quantize(z: Tensor, live: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return z [R, W] in float8 as bytes, and its blocks' scales [R, W / 128] in float32.

    The tail, if there is one, is undefined.
    """
    rows, width = z.shape
    values, scales = quantized_shapes(z, rows, width)
    launch(_quantize.quantize_rows, (ceil_div(rows, _ROWS), scales.shape[1]))(
        z,
        values.view(DTYPE),
        scales,
        live,
        rows,
        width,
        scales.shape[1],
        ROWS=_ROWS,
        BLOCK=BLOCK,
    )
    return values, scales


def quantize_tokens(tokens: Tensor) -> Quantized:
    """Return tokens [T, W] in float8, and their blocks' scales [T, W / 128]."""
    values, scales = quantize(tokens, None)
    return Quantized(values.view(DTYPE), scales)


def quantize_weights(weights: Tensor, forward: bool, backward: bool) -> QuantizedWeights:
    """Return weights [E, M, N] in float8.

    `forward` selects the layout [E, M, N], and `backward` the layout [E, N, M].
    """
    experts, m, n = weights.shape
    values = weights.new_empty(experts, m, n, dtype=DTYPE) if forward else None
    transposed = weights.new_empty(experts, n, m, dtype=DTYPE) if backward else None
    scales = weights.new_empty(experts, m // BLOCK, n // BLOCK, dtype=torch.float32)
    quantized = QuantizedWeights(values, transposed, scales)
    quantize_weights_into(weights, quantized)
    return quantized


def quantize_weights_into(weights: Tensor, quantized: QuantizedWeights) -> None:
    """Write weights [E, M, N] in float8 over `quantized`, in the layouts that it has."""
    scales = quantized.scales
    launch(_quantize.quantize_weights, (scales.numel(),))(
        weights, *quantized, *scales.shape[1:], BLOCK=BLOCK, num_warps=8
    )


def quantized_shapes(like: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Return undefined tensors of the shapes and dtypes that `quantize` returns."""
    scales = like.new_empty(rows, ceil_div(width, BLOCK), dtype=torch.float32)
    return like.new_empty(rows, width, dtype=torch.uint8), scales


def dequantize(values: Tensor, scales: Tensor, live: Tensor, dtype: torch.dtype) -> Tensor:
    """Return z [R, W] in `dtype` from what `quantize` returned."""
    rows, width = values.shape
    z = values.new_empty(rows, width, dtype=dtype)
    launch(_quantize.dequantize_rows, (ceil_div(rows, _ROWS), scales.shape[1]))(
        values.view(DTYPE),
        scales,
        z,
        live,
        width,
        scales.shape[1],
        ROWS=_ROWS,
        BLOCK=BLOCK,
    )
    return z


def split_in_two(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [R, 2W] in a 16-bit dtype: float32 numbers [R, W] rounded, and the rounding errors."""
    rows, width = wide.shape
    both = wide.new_empty(rows, 2 * width, dtype=dtype)
    if rows:
        columns = min(128, power_of_two(width))
        launch(_quantize.split_in_two, (ceil_div(rows, _ROWS), ceil_div(width, columns)))(
            wide.contiguous(), both, rows, width, COLUMNS=columns, ROWS=_ROWS
        )
    return both
