"""Launches of the kernels behind ``tokenyard.packed_rows``."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard.fp8 import BLOCK, DTYPE
from tokenyard.packed_rows import packed_width, unpacked_width
from tokenyard_kernels_triton._device import ceil_div, on_device_of, power_of_two
from tokenyard_kernels_triton.kernels import _packed_rows
from tokenyard_kernels_triton.launching import launch

_COLUMNS = 2048  # at most, for one program


def pack_rows(rows: Tensor) -> Tensor:
    """Do as ``tokenyard.packed_rows.pack_rows``."""
    count, dim = rows.shape
    packed = rows.new_empty(count, packed_width(dim), dtype=torch.uint8)
    _launch(_packed_rows.pack_row, (rows.contiguous(), *_views(packed)), dim, packed)
    return packed


def unpack_rows(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Do as ``tokenyard.packed_rows.unpack_rows``."""
    packed = packed.contiguous()
    rows = packed.new_empty(packed.shape[0], unpacked_width(packed.shape[1]), dtype=dtype)
    _launch(_packed_rows.unpack_row, (*_views(packed), rows), rows.shape[1], packed)
    return rows


def _views(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the packed rows as float8 and as float32."""
    return packed.view(DTYPE), packed.view(torch.float32)


def _launch(kernel: object, tensors: tuple[Tensor, ...], dim: int, packed: Tensor) -> None:
    count, width = packed.shape
    if count == 0 or dim == 0:
        return
    columns = min(_COLUMNS, power_of_two(dim))
    with on_device_of(packed):
        launch(kernel, (count, ceil_div(dim, columns)))(
            *tensors, dim, width // 4, COLUMNS=columns, BLOCK=BLOCK
        )
