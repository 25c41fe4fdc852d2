"""What the forward pass keeps of the pre-activation for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from tokenyard.experts import Donated
from tokenyard.fp8 import BLOCK
from tokenyard_kernels_triton._device import ceil_div
from tokenyard_kernels_triton.ops._quantize import dequantize, quantize, quantized_shapes
from tokenyard_kernels_triton.ops._row_tiles import RowTiles

Save = Literal["pre_activation", "fp8", "recompute"]
"""What the forward pass keeps of the pre-activation for the backward pass."""


def saved_shapes(x: Tensor, rows: int, width: int, save: Save) -> tuple[Tensor, Tensor]:
    """Return undefined tensors with the shapes of what `keep` returns for z [rows, width]."""
    if save == "fp8":
        return quantized_shapes(x, rows, width)
    return x.new_empty(0 if save == "recompute" else rows, width), x.new_empty(0)


def saved_bytes(columns: int, save: Save, width: int) -> int:
    """Return the bytes that are saved of a row of z, whose numbers have `width` bytes."""
    if save == "fp8":
        return columns + 4 * ceil_div(columns, BLOCK)
    return 0 if save == "recompute" else width * columns


def keep(z: Tensor, row_tiles: RowTiles, save: Save) -> tuple[Tensor, Tensor]:
    """Return what is saved of z [R, W], and its scales; both empty if it is recomputed."""
    if save == "fp8":
        return quantize(z, row_tiles.live)
    return z.new_empty(0, z.shape[1]) if save == "recompute" else z, z.new_empty(0)


def restore(
    saved: Sequence[Tensor], like: Tensor, row_tiles: RowTiles, save: Save
) -> Tensor | None:
    """Return z in the dtype of `like` from what `keep` returned; None if it must be recomputed."""
    z, scales = saved
    if save == "recompute":
        return None
    return dequantize(z, scales, row_tiles.live, like.dtype) if save == "fp8" else z


def gradient_space(z: Tensor, saved: Sequence[Tensor], save: Save) -> Tensor:
    """Return where to write the gradient of z: z itself, unless a later backward pass reads that.

    z is what `restore` returned, or recomputed.
    """
    is_saved = save == "pre_activation" and not isinstance(saved, Donated)
    return torch.empty_like(z) if is_saved else z
