"""Block-sparse matmuls in plain torch, block by block, for any device and dtype. Differentiable.

They compute stored blocks only, so they are the kernels' stand-in on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard.interfaces import logits_dtype
from tokenyard_kernels_triton.block_sparse._topology import Topology


def sdd(left: Tensor, right: Tensor, topology: Topology) -> Tensor:
    """Return the blocks [blocks, B, B] of left [M, K] @ right [K, N]. The tail is zero."""
    live = topology.live()
    rows, columns = _positions(topology)
    left_blocks = left.unflatten(0, (topology.rows, topology.block))[rows]  # [blocks, B, K]
    right_blocks = right.unflatten(1, (topology.columns, topology.block))[:, columns]
    products = left_blocks @ right_blocks.transpose(0, 1)  # [blocks, B, B]
    return torch.where(live[:, None, None], products, products.new_zeros(()))


def dsd(data: Tensor, topology: Topology, dense: Tensor, transposed: bool = False) -> Tensor:
    """Return the sparse matrix [M, K], or its transpose, times dense [K, N]."""
    live = topology.live()
    rows, columns = _positions(topology)
    count = topology.columns if transposed else topology.rows
    if transposed:
        data = data.mT
        rows, columns = columns, rows
    data = torch.where(live[:, None, None], data, data.new_zeros(()))
    blocks = dense.unflatten(0, (dense.shape[0] // topology.block, topology.block))[
        columns
    ]  # [blocks, B, N]
    wide = logits_dtype(dense.dtype)  # sums of several blocks are accumulated in it
    out = dense.new_zeros(count, topology.block, dense.shape[1], dtype=wide)
    return out.index_add(0, rows, (data @ blocks).to(wide)).flatten(0, 1).to(dense.dtype)


def to_dense(data: Tensor, topology: Topology) -> Tensor:
    """Return the dense matrix [M, N] of blocks [blocks, B, B]."""
    rows, columns = _positions(topology)
    count = topology.rows * topology.columns
    position = torch.where(topology.live(), rows * topology.columns + columns, count)
    canvas = data.new_zeros(count + 1, *data.shape[1:]).index_copy(0, position, data)[:count]
    grid = canvas.unflatten(0, (topology.rows, topology.columns))  # [rows, columns, B, B]
    return grid.transpose(1, 2).reshape(topology.shape)


def from_dense(dense: Tensor, topology: Topology) -> Tensor:
    """Return the blocks [blocks, B, B] of a dense matrix [M, N]."""
    rows, columns = _positions(topology)
    grid = dense.reshape(topology.rows, topology.block, topology.columns, topology.block)
    blocks = grid.transpose(1, 2)[rows, columns]  # [blocks, B, B]
    return torch.where(topology.live()[:, None, None], blocks, blocks.new_zeros(()))


def _positions(topology: Topology) -> tuple[Tensor, Tensor]:
    """Return the row and column [blocks] of each block, as valid indices in the tail too."""
    rows = topology.row_indices.long().clamp(max=max(0, topology.rows - 1))
    columns = topology.column_indices.long().clamp(max=max(0, topology.columns - 1))
    return rows, columns
