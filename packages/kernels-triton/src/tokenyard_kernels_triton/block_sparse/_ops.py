"""The two block-sparse matmuls as custom operators; each one's gradients are again these two.

A dense operand of three dimensions stands for a matrix in groups: [G, M / G, K] are G matrices one
below the other, and [G, K, N / G] G matrices side by side.
"""

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tokenyard.operators import operator
from tokenyard_kernels_triton._device import (
    ceil_div,
    may_round_float32,
    on_device_of,
    runs_gluon,
    shared_memory,
)
from tokenyard_kernels_triton.block_sparse import reference
from tokenyard_kernels_triton.block_sparse._tiling import (
    GROUP,
    WIDE,
    dense_output_tiling,
    sparse_output_tiling,
)
from tokenyard_kernels_triton.block_sparse._topology import Topology
from tokenyard_kernels_triton.kernels import _block_sparse
from tokenyard_kernels_triton.kernels._tiles import INTERPRETED
from tokenyard_kernels_triton.launching import launch

TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
"""The dtypes that the kernels support."""


@operator("tokenyard_sparse::sdd")
def sdd_op(left: Tensor, right: Tensor, topology: list[Tensor], size: list[int]) -> Tensor:
    """Return the blocks [blocks, B, B] of left [M, K] @ right [K, N].

    `size` is the topology's block, rows and columns.
    """
    sparse = Topology(size[0], size[1], size[2], *topology)
    if not _by_kernels(left):
        return reference.sdd(_stacked(left), _stacked(right.mT).mT, sparse)
    data = left.new_empty(sparse.blocks, sparse.block, sparse.block)
    if data.numel() > 0:
        with on_device_of(left):
            _write_blocks(left, right, data, sparse)
    return data


@sdd_op.fake
def _(left: Tensor, right: Tensor, topology: list[Tensor], size: list[int]) -> Tensor:
    return left.new_empty(topology[0].shape[0], size[0], size[0])


@operator("tokenyard_sparse::dsd")
def dsd_op(
    data: Tensor,
    dense: Tensor,
    topology: list[Tensor],
    size: list[int],
    transposed: bool,
    groups: int,
    columns_first: bool,
) -> Tensor:
    """Return the sparse matrix of blocks `data`, or its transpose, times dense [K, N].

    The result is [M, N] if `groups` is 0, else [groups, M / groups, N]. Its memory is contiguous
    row by row, or column by column if `columns_first`. `size` is the topology's block, rows and
    columns.
    """
    sparse = Topology(size[0], size[1], size[2], *topology)
    out = _empty_output(dense, size, transposed, groups, columns_first)
    if out.numel() > 0 and _by_kernels(dense):
        with on_device_of(dense):
            _write_product(data.contiguous(), dense, out, sparse, transposed)
    elif out.numel() > 0:
        out.copy_(reference.dsd(data, sparse, _stacked(dense), transposed).view(out.shape))
    return out


@dsd_op.fake
def _(
    data: Tensor,
    dense: Tensor,
    topology: list[Tensor],
    size: list[int],
    transposed: bool,
    groups: int,
    columns_first: bool,
) -> Tensor:
    return _empty_output(dense, size, transposed, groups, columns_first)


def _write_blocks(left: Tensor, right: Tensor, data: Tensor, sparse: Topology) -> None:
    if runs_gluon(left.device) and _gluon().can_multiply(sparse.block, left, right, data):
        _gluon().write_blocks(left, right, data, sparse)
        return
    block = sparse.block
    machine = (left.dtype, shared_memory(left.device), _even(left) and _even(right))
    tiling = sparse_output_tiling(block, *machine)
    across = WIDE[block] * block // tiling.columns
    tiles = ceil_div(sparse.blocks, WIDE[block]) * across * (block // tiling.rows)
    launch(_block_sparse.dense_times_dense, (tiles,))(
        left,
        right,
        data,
        sparse.row_indices,
        sparse.column_indices,
        sparse.offsets[-1:],
        sparse.schedule,
        sparse.blocks,
        left.shape[-1],
        *_groups(left, block),
        *left.stride()[-2:],
        *_groups(right.mT, block),
        *right.stride()[-2:],
        CONTIGUOUS=right.stride(-1) == 1 and _groups(right.mT, block)[1] % 16 == 0,
        BLOCK=block,
        WIDE=WIDE[block],
        EVEN=left.shape[-1] % tiling.depth == 0,
        **tiling.options(),
        **_precision(left),
    )


def _write_product(
    data: Tensor, dense: Tensor, out: Tensor, sparse: Topology, transposed: bool
) -> None:
    width = dense.shape[-1]
    wide = runs_gluon(dense.device) and width > 128
    if wide and _gluon().can_multiply(sparse.block, data, dense, out):
        _gluon().write_product(data, dense, out, sparse, transposed)
        return
    block = sparse.block
    machine = (dense.dtype, shared_memory(dense.device), _even(dense) and _even(out))
    tiling = dense_output_tiling(block, *machine, width, dense.stride(-1) != 1)
    rows = sparse.columns if transposed else sparse.rows
    tiles = rows * (block // tiling.rows) * ceil_div(width, tiling.columns)
    launch(_block_sparse.sparse_times_dense, (tiles,))(
        data,
        dense,
        out,
        sparse.column_offsets if transposed else sparse.offsets,
        sparse.column_order,
        sparse.column_rows if transposed else sparse.column_indices,
        rows,
        width,
        *_groups(dense, block),
        *dense.stride()[-2:],
        *_groups(out, block),
        *out.stride()[-2:],
        TRANSPOSED=transposed,
        BLOCK=block,
        GROUP=GROUP,
        EVEN=width % tiling.columns == 0,
        **tiling.options(),
        **_precision(dense),
    )


def _gluon() -> ModuleType:
    """Import the kernels for Hopper GPUs. They need a Triton version with its Gluon names."""
    return importlib.import_module("tokenyard_kernels_triton.block_sparse._gluon")


def _empty_output(
    dense: Tensor, size: list[int], transposed: bool, groups: int, columns_first: bool
) -> Tensor:
    block, rows, columns = size
    blocks = columns if transposed else rows
    width = dense.shape[-1]
    shape = (groups, blocks // groups * block) if groups else (blocks * block,)
    if columns_first:
        return dense.new_empty(*shape[:-1], width, shape[-1]).mT
    return dense.new_empty(*shape, width)


def _groups(dense: Tensor, block: int) -> tuple[int, int]:
    """Return the block rows of a group, and the stride of groups."""
    return max(1, dense.shape[-2] // block), dense.stride(0) if dense.dim() == 3 else 0


def _stacked(dense: Tensor) -> Tensor:
    """Return groups of rows [G, M / G, N] as one matrix [M, N]."""
    return dense.flatten(0, 1) if dense.dim() == 3 else dense


def _even(dense: Tensor) -> bool:
    """Return whether all strides but one of 1 are multiples of 16 bytes."""
    return all(s == 1 or s * dense.element_size() % 16 == 0 for s in dense.stride())


def _by_kernels(tensor: Tensor) -> bool:
    return tensor.is_cuda or (INTERPRETED.value and tensor.dtype in TYPES)


def _precision(x: Tensor) -> dict[str, Any]:
    full = x.dtype == torch.float32 and not may_round_float32()
    return {"PRECISION": "ieee" if full else "tf32", "TYPE": TYPES[x.dtype]}


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, second, topology, ctx.size, *ctx.constants = inputs
    ctx.save_for_backward(first, second, *topology)


def _like(dense: Tensor) -> tuple[int, bool]:
    """Return `groups` and `columns_first` of a gradient that is laid out like its tensor."""
    groups = dense.shape[0] if dense.dim() == 3 else 0
    return groups, dense.stride(-2) < dense.stride(-1)


def _sdd_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    left, right, *topology = ctx.saved_tensors
    size = ctx.size
    dleft: Tensor | None = None
    dright: Tensor | None = None
    if ctx.needs_input_grad[0]:
        dleft = dsd_op(gradient, right.mT, topology, size, False, *_like(left))
    if ctx.needs_input_grad[1]:
        dright = dsd_op(gradient, left, topology, size, True, *_like(right.mT)).mT
    return dleft, dright, [None] * len(topology), None


def _dsd_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    data, dense, *topology = ctx.saved_tensors
    transposed = ctx.constants[0]
    ddata: Tensor | None = None
    ddense: Tensor | None = None
    if ctx.needs_input_grad[0]:
        pair = (dense, gradient.mT) if transposed else (gradient, dense.mT)
        ddata = sdd_op(*pair, topology, ctx.size)
    if ctx.needs_input_grad[1]:
        ddense = dsd_op(data, gradient, topology, ctx.size, not transposed, *_like(dense))
    return ddata, ddense, [None] * len(topology), None, None, None, None


sdd_op.differentiable(_sdd_backward, _save)
dsd_op.differentiable(_dsd_backward, _save)


@register_flop_formula(torch.ops.tokenyard_sparse.sdd)
def _sdd_flops(left: list[int], *arguments: Any, out_shape: list[int], **_: Any) -> int:
    """Return the FLOPs for torch's counter, by shapes. Blocks of the tail count."""
    return 2 * math.prod(out_shape) * left[-1]


@register_flop_formula(torch.ops.tokenyard_sparse.dsd)
def _dsd_flops(data: list[int], dense: list[int], *arguments: Any, **_: Any) -> int:
    """Return the FLOPs for torch's counter, by shapes. Blocks of the tail count."""
    return 2 * math.prod(data) * dense[-1]
