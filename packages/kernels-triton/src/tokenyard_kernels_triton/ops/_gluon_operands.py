"""Operands of the matmuls for Hopper GPUs: TMA descriptors, or tokens whose rows are gathered."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tokenyard.interfaces import Plan
from tokenyard_kernels_triton.ops._moves import to_rows
from tokenyard_kernels_triton.ops._token_rows import Rows, TokenRows

# Sizes of the two dimensions that make a matrix ragged; see ``kernels._gluon_pipeline``.
_RAGGED_ROWS = 1 << 30  # more than a ragged matrix has
_MANY = 0x7FFF0000
_WRAP = 1 << 34  # times _RAGGED_ROWS, it is a multiple of 2^64

# Columns of an expert: up to this width the matmuls gather rows, since a copy would take longer.
NARROW = 1280
_MOST_UNITS = 1 << 31  # of 16 bytes, which loaders that gather count in int32


def rows_of(tokens: Tensor, plan: Plan, ffn_dim: int) -> Rows:
    """Return the rows of tokens [T, D] as an operand.

    They are copied, or gathered by each matmul if the experts are narrow.
    """
    if are_gathered(tokens, ffn_dim):
        return TokenRows(tokens, plan.order, plan.top_k)
    return to_rows(tokens, plan)


def are_gathered(tokens: Tensor, ffn_dim: int) -> bool:
    """Return whether the matmuls of experts gather rows from tokens."""
    return ffn_dim <= NARROW and tokens.nbytes // 16 < _MOST_UNITS


def operand(rows: Rows, block: tuple[int, int]) -> tuple[Any, Tensor | None, int]:
    """Return a kernel's arguments for `rows`: (descriptor, None, 0) or (tokens, order, top_k)."""
    if isinstance(rows, TokenRows):
        return rows.tokens, rows.order, rows.top_k
    return ragged(rows, 1, block), None, 0


def ragged(rows: Tensor, parts: int, block: tuple[int, int]) -> TensorDescriptor:
    """Describe rows [R, parts * W], for boxes of one part that end with their expert's rows.

    A box has `block` (rows, columns).
    """
    width = rows.shape[1]
    box = [1, 1, block[0], 1, block[1]]
    shape = [_MANY, _MANY, _RAGGED_ROWS, parts, width // parts]
    strides = [_WRAP - width, width, width, width // parts, 1]
    return TensorDescriptor(rows, shape, strides, box, _layout(box, rows))


def stacked(weights: Tensor, parts: int, block: tuple[int, int]) -> TensorDescriptor:
    """Describe weights [E, parts * M, N], for boxes of `block` (rows of each part, columns)."""
    experts, rows, columns = weights.shape
    box = [1, parts, *block]
    split = weights.view(experts, parts, rows // parts, columns)
    return described(split, box)


def described(tensor: Tensor, box: Sequence[int]) -> TensorDescriptor:
    """Describe a tensor whose last dimension is contiguous, for boxes of a shape."""
    return TensorDescriptor.from_tensor(tensor, list(box), _layout(box, tensor))


def _layout(box: Sequence[int], like: Tensor) -> gl.NVMMASharedLayout:
    size = like.element_size()
    return _shared_layout(min(128, box[-1] * size), 8 * size, len(box))


@functools.cache  # a layout takes longer to make than a launch
def _shared_layout(swizzle: int, bits: int, rank: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle, bits, rank=rank)
