"""Launches of the block-sparse matmuls for Hopper GPUs, in Gluon."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenyard_kernels_triton._device import ceil_div, persistent_grid, processors
from tokenyard_kernels_triton.block_sparse._topology import Topology
from tokenyard_kernels_triton.kernels import _gluon_block_sparse
from tokenyard_kernels_triton.launching import launch
from tokenyard_kernels_triton.ops._gluon_operands import described

_COLUMNS = 256  # of a tile
_CHUNK = 64  # columns stored at a time
_DEPTH = 64  # of a slice
_GROUP = 16  # block rows that use the same columns of a dense operand while they are in cache
_OPTIONS = {"CHUNK": _CHUNK, "STAGES": 4, "BUFFERS": 2, "num_warps": 4, "maxnreg": 168}


def write_product(
    data: Tensor, dense: Tensor, out: Tensor, sparse: Topology, transposed: bool
) -> None:
    """Write sparse [M, K] or its transpose @ dense [K, N] to out [M, N]; `can_multiply` holds."""
    width = dense.shape[-1]
    rows = sparse.columns if transposed else sparse.rows
    right, by_depth = _matrices(dense, (_DEPTH, _COLUMNS))
    result, by_rows = _matrices(out, (64, _CHUNK))
    tiles = rows * ceil_div(width, _COLUMNS)
    launch(_gluon_block_sparse.sparse_times_dense, persistent_grid(dense.device, tiles))(
        described(data, (1, _DEPTH, 64) if transposed else (1, 64, _DEPTH)),
        right,
        result,
        sparse.column_offsets if transposed else sparse.offsets,
        sparse.column_order,
        sparse.column_rows if transposed else sparse.column_indices,
        rows,
        width,
        dense.shape[-2] // sparse.block,
        out.shape[-2] // sparse.block,
        A_BY_DEPTH=transposed,
        B_BY_DEPTH=by_depth,
        OUT_BY_COLUMNS=not by_rows,
        GROUP=_GROUP,
        PROGRAMS=processors(dense.device),
        **_OPTIONS,
    )


def write_blocks(left: Tensor, right: Tensor, data: Tensor, sparse: Topology) -> None:
    """Write the blocks [blocks, B, B] of left [M, K] @ right [K, N]; `can_multiply` holds."""
    a, by_rows = _matrices(left, (64, _DEPTH))
    b, by_depth = _matrices(right, (_DEPTH, sparse.block))
    tiles = ceil_div(sparse.blocks, 2)
    launch(_gluon_block_sparse.dense_times_dense, persistent_grid(left.device, tiles))(
        a,
        b,
        described(data, (1, 64, _CHUNK)),
        sparse.row_indices,
        sparse.column_indices,
        sparse.schedule,
        sparse.blocks,
        sparse.rows,
        left.shape[-1],
        left.shape[-2] // sparse.block,
        right.shape[-1] // sparse.block,
        A_BY_DEPTH=not by_rows,
        B_BY_DEPTH=by_depth,
        PROGRAMS=processors(left.device),
        **_OPTIONS,
    )


def can_multiply(block: int, *matrices: Tensor) -> bool:
    """Return whether the kernels take matrices or groups of them: by TMA, and blocks of 128."""
    same = all(matrix.dtype in (torch.bfloat16, torch.float16) for matrix in matrices)
    return same and block == 128 and all(map(_by_tma, matrices))


def _by_tma(matrix: Tensor) -> bool:
    """Return whether one stride is 1, all others are whole 16 bytes, and so is the address."""
    *others, row, column = matrix.stride()
    if row == 1:
        row = column
    elif column != 1:
        return False
    strides = (*others, row)
    whole = all(stride > 0 and stride * matrix.element_size() % 16 == 0 for stride in strides)
    return whole and matrix.numel() > 0 and matrix.data_ptr() % 16 == 0


def _matrices(matrix: Tensor, box: tuple[int, int]) -> tuple[Any, bool]:
    """Return the descriptor of [M, N] or groups [G, M, N] for boxes, and whether it is by rows.

    If the columns are contiguous instead, it describes the transposes.
    """
    groups = matrix if matrix.dim() == 3 else matrix[None]
    if groups.stride(-1) == 1:
        return described(groups, (1, *box)), True
    return described(groups.mT, (1, *reversed(box))), False
