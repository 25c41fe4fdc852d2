"""The FP8 recipe of expert matmuls, in plain torch: e4m3 numbers with a float32 scale a block.

A block is 128 columns of a row of activations or gradients, or 128 x 128 numbers of a weight. Its
scale maps its largest number to the largest one of e4m3, so that no other block matters to it
(DeepSeek-V3, arXiv 2412.19437, section 3.3.2). Kernels fuse this into other work; what they
compute must agree with these functions.

* NaN stays NaN, and the other numbers of its block keep their values.
* A block with an infinite number becomes NaN as a whole.
* A block of zeros stays zero. The scale of a block of tiny numbers is `SMALLEST_SCALE`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn

BLOCK = 128
"""The numbers of a row, or rows and columns of a weight, that share a scale."""

LARGEST = torch.finfo(DTYPE).max
"""The largest number of e4m3, 448."""

SMALLEST_SCALE = 2.0**-126
"""The smallest scale. Neither it nor its inverse is subnormal or infinite in float32."""


class Quantized(NamedTuple):
    """Numbers in e4m3 and the scale of each block; their products are the numbers."""

    values: Tensor  # float8_e4m3fn
    scales: Tensor  # float32


def why_no_fp8(dim: int, ffn_dim: int = BLOCK) -> str | None:
    """Return why rows and experts of these widths cannot be in FP8, or None if they can."""
    for name, width in (("dim", dim), ("ffn_dim", ffn_dim)):
        if width % BLOCK:
            return (
                f"precision fp8 scales blocks of {BLOCK} columns, and {name} is {width}, "
                f"not a multiple of {BLOCK}"
            )
    return None


def quantize_rows(rows: Tensor) -> Quantized:
    """Quantize rows [..., W] with a scale for each 128 columns of a row: [..., W / 128]."""
    blocks = rows.float().unflatten(-1, (-1, BLOCK))
    scales = _scales(blocks, (-1,))
    values = (blocks / scales).to(DTYPE)
    return Quantized(values.flatten(-2), scales.flatten(-2))


def quantize_weights(weights: Tensor) -> Quantized:
    """Quantize weights [E, M, N] with a scale for each 128 x 128: [E, M / 128, N / 128].

    The transposed weights have the same values and scales, transposed.
    """
    blocks = weights.float().unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    scales = _scales(blocks, (-3, -1))
    values = (blocks / scales).to(DTYPE)
    return Quantized(values.flatten(-2).flatten(-3, -2), scales.squeeze(-1).squeeze(-2))


def dequantize(quantized: Quantized) -> Tensor:
    """Return the numbers in float32."""
    values, scales = quantized
    for dim in (-2, -1):
        if scales.shape[dim] != values.shape[dim]:
            scales = scales.repeat_interleave(BLOCK, dim)
    return values.float() * scales


def _scales(blocks: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return the scales of blocks, whose numbers are those along `dims`. NaN does not count."""
    magnitudes = blocks.abs().nan_to_num(nan=0.0, posinf=math.inf)
    return (magnitudes.amax(dims, keepdim=True) / LARGEST).clamp(min=SMALLEST_SCALE)
