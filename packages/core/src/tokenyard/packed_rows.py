"""Rows in FP8 in one buffer: the numbers of each row, then its scales.

So they travel between ranks in one collective. The recipe is that of ``tokenyard.fp8``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard.fp8 import BLOCK, DTYPE, Quantized, dequantize, quantize_rows
from tokenyard.operators import operator

SCALE_BYTES = 4
"""The bytes of a scale, a float32."""


def packed_width(dim: int) -> int:
    """Return the bytes of a packed row of `dim` numbers, a multiple of 128."""
    return dim + SCALE_BYTES * (dim // BLOCK)


def unpacked_width(width: int) -> int:
    """Return the numbers in a packed row of `width` bytes."""
    return width // (BLOCK + SCALE_BYTES) * BLOCK


def pack_rows(rows: Tensor) -> Tensor:
    """Quantize rows [R, D] and pack them: [R, D + D / 32] uint8. Not differentiable.

    A package may register a faster kernel for a device with
    ``torch.library.impl("tokenyard::pack_rows", device)``.
    """
    packed: Tensor = _pack.op(rows)  # by torch's dispatcher, which finds the device's kernel
    return packed


def unpack_rows(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows [R, D] in `dtype` from what `pack_rows` returned. Not differentiable.

    A package may register a faster kernel for a device with
    ``torch.library.impl("tokenyard::unpack_rows", device)``.
    """
    rows: Tensor = _unpack.op(packed, dtype)
    return rows


def pack_plainly(rows: Tensor) -> Tensor:
    """Do as `pack_rows`, in plain torch."""
    values, scales = quantize_rows(rows)
    return torch.cat((values.view(torch.uint8), scales.view(torch.uint8)), 1)


def unpack_plainly(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Do as `unpack_rows`, in plain torch."""
    dim = unpacked_width(packed.shape[1])
    values = packed[:, :dim].view(DTYPE)
    scales = packed[:, dim:].contiguous().view(torch.float32)
    return dequantize(Quantized(values, scales)).to(dtype)


_pack = operator("tokenyard::pack_rows", "(Tensor rows) -> Tensor")(pack_plainly)
_unpack = operator("tokenyard::unpack_rows", "(Tensor packed, ScalarType dtype) -> Tensor")(
    unpack_plainly
)


@_pack.fake
def _(rows: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], packed_width(rows.shape[1]), dtype=torch.uint8)


@_unpack.fake
def _(packed: Tensor, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(packed.shape[0], unpacked_width(packed.shape[1]), dtype=dtype)
