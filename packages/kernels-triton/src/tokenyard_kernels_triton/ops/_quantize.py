"""Launching the conversion of numbers to fewer bits and back."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard_kernels_triton._device import ceil_div, power_of_two
from tokenyard_kernels_triton.kernels import _quantize
from tokenyard_kernels_triton.kernels._quantize import BLOCK
from tokenyard_kernels_triton.launching import launch

_DTYPE = torch.float8_e4m3fn
_ROWS = 32


def narrow(z: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Return z [R, W] in float8, as bytes, and the scales [R, W / 128] of its blocks; the tail is undefined."""
    rows, width = z.shape
    out, scales = narrow_shapes(z, rows, width)
    launch(_quantize.quantize_rows, (ceil_div(rows, _ROWS), scales.shape[1]))(
        z,
        out.view(_DTYPE),
        scales,
        live,
        width,
        scales.shape[1],
        LARGEST=torch.finfo(_DTYPE).max,
        ROWS=_ROWS,
        BLOCK=BLOCK,
    )
    return out, scales


def narrow_shapes(like: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Return what `narrow` returns, undefined."""
    scales = like.new_empty(rows, ceil_div(width, BLOCK), dtype=torch.float32)
    return like.new_empty(rows, width, dtype=torch.uint8), scales


def widen(z: Tensor, scales: Tensor, live: Tensor, dtype: torch.dtype) -> Tensor:
    """Return z [R, W] in `dtype`."""
    rows, width = z.shape
    out = z.new_empty(rows, width, dtype=dtype)
    launch(_quantize.dequantize_rows, (ceil_div(rows, _ROWS), scales.shape[1]))(
        z.view(_DTYPE), scales, out, live, width, scales.shape[1], ROWS=_ROWS, BLOCK=BLOCK
    )
    return out


def split_in_two(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [R, 2W] in a narrow dtype: float32 numbers [R, W], and beside them what rounding has left out."""
    rows, width = wide.shape
    both = wide.new_empty(rows, 2 * width, dtype=dtype)
    if rows:
        columns = min(128, power_of_two(width))
        launch(_quantize.split_in_two, (ceil_div(rows, _ROWS), ceil_div(width, columns)))(
            wide.contiguous(), both, rows, width, COLUMNS=columns, ROWS=_ROWS
        )
    return both
