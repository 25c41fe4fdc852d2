"""Launches of the low-rank matmuls of adapters.

Each reads its large operand once. r is the rank of the adapter.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenyard.activations import is_gated
from tokenyard.interfaces import Plan
from tokenyard_kernels_triton._device import ceil_div, power_of_two
from tokenyard_kernels_triton.kernels import _add_low_rank, _low_rank
from tokenyard_kernels_triton.kernels._activations import function_of
from tokenyard_kernels_triton.kernels._tiles import INTERPRETED
from tokenyard_kernels_triton.launching import launch
from tokenyard_kernels_triton.ops._portable import number_options
from tokenyard_kernels_triton.ops._row_tiles import RowTiles

MAX_RANK = 128
"""The highest rank that fits into one tile."""

_NARROW = 32  # up to this rank, tiles are larger
_GROUP = 16  # row tiles of a group in the tile list


class WideOperand(NamedTuple):
    """The large operand of a low-rank matmul: rows [R, width], or tokens that are gathered."""

    source: Tensor  # [R, width], or tokens [T, width] with top_k
    order: Tensor  # [R], of the plan
    top_k: int = 0
    mask: Tensor | None = None  # [R, width] bool: the numbers that are read; None: all

    @property
    def width(self) -> int:
        """Columns of a row."""
        return self.source.shape[1]

    def options(self) -> dict[str, Any]:
        """Return the arguments of a kernel that say how to read this operand."""
        return {"TOP_K": self.top_k, "MASKED": self.mask is not None} | number_options(self.source)


def tokens_as_rows(tokens: Tensor, plan: Plan) -> WideOperand:
    """Return the rows of tokens [T, width] as an operand; kernels gather them."""
    return WideOperand(tokens, plan.order, plan.top_k)


def to_low_rank(
    wide: WideOperand, matrix: Tensor, scale: float, row_tiles: RowTiles, transposed: bool
) -> Tensor:
    """Return low [R, r]: scale * rows times the matrix of each row's expert.

    That is A [E, r, width], or B [E, width, r] if `transposed`.
    """
    rank = matrix.shape[2 if transposed else 1]
    low = wide.source.new_empty(row_tiles.rows, rank)
    rows = _rows()
    launch(_low_rank.to_low_rank, (row_tiles.bound(rows),))(
        wide.source,
        wide.order,
        wide.mask,
        matrix,
        low,
        row_tiles.tile_list(rows, _GROUP),
        wide.width,
        rank,
        scale,
        TRANSPOSED=transposed,
        ROWS=rows,
        DEPTH=_depth(wide, rank),
        RANK=_padded(rank),
        **wide.options(),
    )
    return low


def add_low_rank(
    out: Tensor,
    low: Tensor,
    matrix: Tensor,
    mask: Tensor | None,
    row_tiles: RowTiles,
    transposed: bool,
    add: bool = True,
) -> None:
    """Add low [R, r] times the matrix of each row's expert, times mask, to out [R, width].

    With ``add=False`` it replaces `out`.
    """
    width = out.shape[1]
    rows = _rows()
    columns = _columns(out, low)
    launch(_add_low_rank.add_low_rank, (row_tiles.bound(rows) * ceil_div(width, columns),))(
        low,
        matrix,
        mask,
        out,
        row_tiles.tile_list(rows, _GROUP),
        low.shape[1],
        width,
        MASKED=mask is not None,
        TRANSPOSED=transposed,
        ADD=add,
        ROWS=rows,
        COLUMNS=columns,
        **_rank_options(low),
        **number_options(out),
    )


def add_low_rank_and_activate(
    z: Tensor,
    low: Tensor,
    matrix: Tensor,
    row_tiles: RowTiles,
    activation: str,
    keep_a: bool = True,
) -> Tensor:
    """Add low [R, r] times B [E, 2F or F, r] to z in place; return act(z) [R, F], or an empty one.

    It is empty without `keep_a`.
    """
    parts = 2 if is_gated(activation) else 1
    ffn_dim = z.shape[1] // parts
    a = z.new_empty(row_tiles.rows if keep_a else 0, ffn_dim)
    rows = _rows()
    columns = _columns(z, low) // parts
    grid = (row_tiles.bound(rows) * ceil_div(ffn_dim, columns),)
    launch(_add_low_rank.add_low_rank_and_activate, grid)(
        z,
        low,
        matrix,
        a,
        row_tiles.tile_list(rows, _GROUP),
        low.shape[1],
        ffn_dim,
        FUNCTION=function_of(activation),
        PARTS=parts,
        KEEP_A=keep_a,
        ROWS=rows,
        COLUMNS=columns,
        **_rank_options(low),
        **number_options(z),
    )
    return a


def low_rank_gradient(
    wide: WideOperand,
    low: Tensor,
    topk_weights: Tensor | None,
    row_tiles: RowTiles,
    transposed: bool,
) -> Tensor:
    """Return the gradient of A [E, r, width], or of B [E, width, r] if `transposed`.

    It is the sum over each expert's rows of row * low * weight; zero for an expert without rows.
    topk_weights are [T, K]; None means 1.
    """
    rank = low.shape[1]
    shape = (wide.width, rank) if transposed else (rank, wide.width)
    out = low.new_empty(row_tiles.num_experts, *shape)
    columns = _columns(wide.source, low) if rank <= _NARROW else _columns(low) // 2
    launch(_low_rank.low_rank_gradient, (row_tiles.num_experts * ceil_div(wide.width, columns),))(
        wide.source,
        wide.order,
        wide.mask,
        low,
        topk_weights,
        out,
        row_tiles.offsets,
        row_tiles.largest_first(),
        wide.width,
        rank,
        WEIGHTED=topk_weights is not None,
        TRANSPOSED=transposed,
        COLUMNS=columns,
        DEPTH=min(64, _depth(wide, rank)),
        RANK=_padded(rank),
        **wide.options(),
    )
    return out


def _rows() -> int:
    """Return the rows of a tile."""
    return 32 if INTERPRETED.value else 64


def _columns(*matrices: Tensor) -> int:
    """Return the columns of a tile."""
    if INTERPRETED.value:
        return 32
    return 128 if _fit_large_tiles(*matrices) else 64


def _depth(wide: WideOperand, rank: int) -> int:
    """Return the length of a slice of the reduction dimension."""
    if INTERPRETED.value or wide.mask is not None or not _fit_large_tiles(wide.source):
        return 32 if wide.source.dtype != torch.float32 or rank <= _NARROW else 16
    return 128 if rank <= _NARROW else 64


def _fit_large_tiles(*matrices: Tensor) -> bool:
    """Return whether tiles take few registers: 16-bit numbers in rows of whole 16 bytes."""
    return all(m.dtype != torch.float32 and m.shape[-1] % 8 == 0 for m in matrices)


def _rank_options(low: Tensor) -> dict[str, int]:
    """Return the padded rank and the length of its slices, as a kernel's arguments."""
    rank = _padded(low.shape[1])
    return {"RANK": rank, "SLICE": min(rank, 16 if low.dtype == torch.float32 else 64)}


def _padded(rank: int) -> int:
    return max(16, power_of_two(rank))
