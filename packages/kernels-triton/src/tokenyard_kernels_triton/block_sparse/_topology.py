"""Which blocks a block-sparse matrix has, and how kernels find them by row and by column."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenyard.errors import ConfigError
from tokenyard_kernels_triton.block_sparse._tiling import BLOCKS, GROUP, WIDE


class Topology(NamedTuple):
    """The positions of the blocks of a block-sparse matrix. Make one by the functions below.

    Blocks are stored row by row, and those of a row in any order. Blocks from ``offsets[-1]`` on
    are the tail: they belong to no position, are never read, and hold zero. So a topology that is
    computed on the device needs no host sync: the number of stored blocks is a bound.
    """

    block: int  # B: 64 or 128
    rows: int  # of blocks
    columns: int  # of blocks
    row_indices: Tensor  # [blocks] int32; `rows` in the tail
    column_indices: Tensor  # [blocks] int32; `columns` in the tail
    offsets: Tensor  # [rows + 1] int32: the blocks of row r are offsets[r]:offsets[r + 1]
    column_order: Tensor  # [blocks] int32: the blocks sorted by column, then by row
    column_rows: Tensor  # [blocks] int32: the block row of each, in the same order
    column_offsets: Tensor  # [columns + 1] int32: of column c in column_order
    schedule: Tensor  # int32: the order in which a kernel computes runs of consecutive blocks

    @property
    def blocks(self) -> int:
        """The number of stored blocks, with the tail."""
        return self.row_indices.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix."""
        return self.rows * self.block, self.columns * self.block

    def tensors(self) -> list[Tensor]:
        """Return the fields that are tensors, in order."""
        return [
            self.row_indices,
            self.column_indices,
            self.offsets,
            self.column_order,
            self.column_rows,
            self.column_offsets,
            self.schedule,
        ]

    def live(self) -> Tensor:
        """Return [blocks] bool: True for blocks before the tail."""
        return self.row_indices < self.rows


def topology_of_mask(mask: Tensor, block: int) -> Topology:
    """Return the topology with a block wherever mask [rows, columns] is True. Syncs with the host.

    Raises ConfigError if the block size is not supported.
    """
    if mask.dim() != 2:
        raise ConfigError(f"the mask has {mask.dim()} dimensions; give one [rows, columns]")
    row_indices, column_indices = mask.bool().nonzero(as_tuple=True)
    return topology_of_indices(row_indices, column_indices, mask.shape[0], mask.shape[1], block)


def topology_of_indices(
    row_indices: Tensor, column_indices: Tensor, rows: int, columns: int, block: int
) -> Topology:
    """Return the topology of `rows` x `columns` blocks with the given ones, without a host sync.

    row_indices [blocks] ascend. No position occurs twice. Blocks whose row index is `rows` are the
    tail. Raises ConfigError if the block size is not supported.
    """
    if block not in BLOCKS:
        known = ", ".join(map(str, BLOCKS))
        raise ConfigError(f"block is {block}; block-sparse matrices have blocks of {known}")
    tail = row_indices >= rows
    row_indices = row_indices.masked_fill(tail, rows).int()
    column_indices = column_indices.masked_fill(tail, columns).int()
    sorted_columns, column_order = column_indices.sort(stable=True)
    return Topology(
        block,
        rows,
        columns,
        row_indices,
        column_indices,
        _starts(row_indices, rows),
        column_order.int(),
        row_indices[column_order],
        _starts(sorted_columns, columns),
        _schedule(row_indices, column_indices, columns, WIDE[block]),
    )


def topology_of_experts(
    offsets: Tensor, rows: int, widths: Tensor, most: int, block: int, gated: bool = False
) -> Topology:
    """Return the block-diagonal topology of experts, without a host sync.

    Each expert e has the block rows ``offsets[e]:offsets[e + 1]`` and the first ``widths[e]`` of
    its `most` block columns. `offsets` [E + 1] and `widths` [E] count in blocks, and `rows` bounds
    ``offsets[-1]``.

    If `gated`, an expert has 2 * `most` block columns: `most` for the gate, then `most` for up. A
    gate block and the up block of the same columns are stored one after the other.
    """
    device = offsets.device
    parts = 2 if gated else 1
    row = torch.arange(rows, device=device, dtype=offsets.dtype)
    expert = torch.searchsorted(offsets[1:].contiguous(), row, right=True)  # [rows], E past all
    stored = torch.cat([parts * widths, widths.new_zeros(1)])[expert]
    ends = stored.cumsum(0)  # [rows]
    position = torch.arange(rows * parts * most, device=device)
    row_indices = torch.searchsorted(ends, position, right=True)  # `rows` in the tail
    at = row_indices.clamp(max=max(0, rows - 1))
    in_row = position - (ends - stored)[at]
    column = expert[at] * parts * most + in_row % parts * most + in_row // parts
    columns = widths.shape[0] * parts * most
    return topology_of_indices(row_indices, column, rows, columns, block)


def _starts(indices: Tensor, count: int) -> Tensor:
    """Return [count + 1] int32: the first position of each index in ascending indices."""
    each = torch.arange(count + 1, device=indices.device, dtype=indices.dtype)
    return torch.searchsorted(indices, each, out_int32=True)


def _schedule(rows: Tensor, columns: Tensor, width: int, wide: int) -> Tensor:
    """Return the order of runs of `wide` blocks: by GROUP of rows, then by column, then by row.

    So the rows and the columns that programs read at the same time stay in cache.
    """
    key = (rows[::wide] // GROUP).long() * (width + 1) + columns[::wide]
    return key.argsort(stable=True).int()
