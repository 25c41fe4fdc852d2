"""Launches of the conversions to fewer bits and back."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard_kernels_triton._device import ceil_div, power_of_two
from tokenyard_kernels_triton.kernels import _quantize
from tokenyard_kernels_triton.kernels._quantize import BLOCK
from tokenyard_kernels_triton.launching import launch

_DTYPE = torch.float8_e4m3fn
_ROWS = 32


def quantize(z: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Return z [R, W] in float8 as bytes, and its blocks' scales [R, W / 128] in float32.

    The tail is undefined.
    """
    rows, width = z.shape
    values, scales = quantized_shapes(z, rows, width)
    launch(_quantize.quantize_rows, (ceil_div(rows, _ROWS), scales.shape[1]))(
        z,
        values.view(_DTYPE),
        scales,
        live,
        width,
        scales.shape[1],
        LARGEST=torch.finfo(_DTYPE).max,
        ROWS=_ROWS,
        BLOCK=BLOCK,
    )
    return values, scales


def quantized_shapes(like: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Return undefined tensors of the shapes and dtypes that `quantize` returns."""
    scales = like.new_empty(rows, ceil_div(width, BLOCK), dtype=torch.float32)
    return like.new_empty(rows, width, dtype=torch.uint8), scales


def dequantize(values: Tensor, scales: Tensor, live: Tensor, dtype: torch.dtype) -> Tensor:
    """Return z [R, W] in `dtype` from what `quantize` returned."""
    rows, width = values.shape
    z = values.new_empty(rows, width, dtype=dtype)
    launch(_quantize.dequantize_rows, (ceil_div(rows, _ROWS), scales.shape[1]))(
        values.view(_DTYPE),
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
