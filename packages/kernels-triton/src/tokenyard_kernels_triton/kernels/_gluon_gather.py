"""Loaders that take an operand's rows straight from the tokens they belong to, so that nobody copies them first.

Four warps collect the rows of a slice by asynchronous copies of 16 bytes, while the copy engine brings the other operand.
Each thread's copies arrive at the slice's barrier by themselves; the warpgroup that waits there makes them visible to its
products by a fence. It costs a product some 7 % of its time, which pays where experts are narrow: a copy takes as long for
narrow experts as for wide ones.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from tokenyard_kernels_triton.kernels._gluon_pipeline import load, ragged_at
from tokenyard_kernels_triton.kernels._schedule import matrix_tile_at, tile_at

_copy = (
    getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
)  # as Triton 3.6 calls it
_BOX = gl.constexpr(
    gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
)  # 64 rows of 64 columns, 16 bytes a thread


@gluon.jit
def collect_row_tiles(
    operands,
    sizes,
    PARTS: gl.constexpr,
    B_BY_DEPTH: gl.constexpr,
    TOP_K: gl.constexpr,
    DEPTH: gl.constexpr,
    COLUMNS: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Load the slices of every tile of rows times weight."""
    x, order, weight, a, b, full, empty, tiles = operands
    depth, width = sizes
    columns = gl.cdiv(width, COLUMNS // PARTS)
    done = 0
    for index in range(gl.program_id(0), gl.load(tiles) * columns, PROGRAMS):
        expert, row, end, n = tile_at(tiles, columns, index, 128)
        column = n * (COLUMNS // PARTS)
        upper, in_upper = _tokens_at(order, row, end, TOP_K)
        lower, in_lower = _tokens_at(order, row + 64, end, TOP_K)
        for k in range(0, depth, DEPTH):
            if B_BY_DEPTH:
                at = [expert, 0, k, column]
            else:
                at = [expert, 0, column, k]
            stage = done % STAGES
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), ((done // STAGES) & 1) ^ 1)
            mbarrier.expect(ready, weight.block_type.nbytes)
            load(weight, at, ready, b.index(stage))
            _collect(
                x,
                upper,
                in_upper,
                k,
                depth,
                a.index(2 * stage),
            )
            _collect(
                x,
                lower,
                in_lower,
                k,
                depth,
                a.index(2 * stage + 1),
            )
            async_copy.mbarrier_arrive(ready, increment_count=False)
            done += 1


@gluon.jit
def collect_column_tiles(
    operands,
    sizes,
    TOP_K: gl.constexpr,
    COLLECT_LEFT: gl.constexpr,
    DEPTH: gl.constexpr,
    COLUMNS: gl.constexpr,
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Load the slices of every tile of a weight gradient; the left operand's rows are those of tokens, or the right's."""
    left, right, order, a, b, full, empty, offsets, by_rows = operands
    num_experts, rows, columns = sizes
    m_tiles, n_tiles = gl.cdiv(rows, 128), gl.cdiv(columns, COLUMNS)
    each = m_tiles * n_tiles
    done = 0
    for index in range(gl.program_id(0), num_experts * each, PROGRAMS):
        expert = gl.load(by_rows + index // each)
        m, n = matrix_tile_at(m_tiles, n_tiles, index % each, GROUP)
        first, end = gl.load(offsets + expert), gl.load(offsets + expert + 1)
        tokens, inside = _tokens_at(order, first, end, TOP_K)
        for k in range(first, end, DEPTH):
            later, in_later = _tokens_at(
                order, k + DEPTH, end, TOP_K
            )  # under way while this slice is waited for
            stage = done % STAGES
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), ((done // STAGES) & 1) ^ 1)
            if COLLECT_LEFT:
                mbarrier.expect(ready, right.block_type.nbytes)
                load(right, ragged_at(k, end, 0, n * COLUMNS), ready, b.index(stage))
                for half in gl.static_range(2):
                    _collect(
                        left,
                        tokens,
                        inside,
                        m * 128 + 64 * half,
                        rows,
                        a.index(2 * stage + half),
                    )
            else:
                mbarrier.expect(ready, 2 * left.block_type.nbytes)
                for half in gl.static_range(2):
                    load(
                        left,
                        ragged_at(k, end, 0, m * 128 + 64 * half),
                        ready,
                        a.index(2 * stage + half),
                    )
                for quarter in gl.static_range(COLUMNS // 64):
                    room = b.index(stage).slice(64 * quarter, 64, 1)
                    _collect(
                        right,
                        tokens,
                        inside,
                        n * COLUMNS + 64 * quarter,
                        columns,
                        room,
                    )
            async_copy.mbarrier_arrive(ready, increment_count=False)
            tokens, inside = later, in_later
            done += 1


@gluon.jit
def _tokens_at(order, row, end, TOP_K: gl.constexpr):
    """Return the tokens of 64 rows from `row` on, and which of the rows come before `end`."""
    r = row + gl.arange(0, 64, gl.SliceLayout(1, _BOX))
    return gl.load(order + r, mask=r < end, other=0) // TOP_K, r < end


@gluon.jit
def _collect(
    x,
    tokens,
    inside,
    first,
    dim,
    room,
):
    """Start copying 64 columns from `first` on of 64 tokens x [T, dim]; zeros where a row or column is outside."""
    eighths = dim // 8  # 16 bytes each; so the compiler sees that no copy is torn
    column = first + gl.arange(0, 64, gl.SliceLayout(0, _BOX))
    pointers = x + (tokens.to(gl.int64) * eighths)[:, None] * 8 + column[None, :]
    _copy(room, pointers, mask=inside[:, None] & (column // 8 < eighths)[None, :])
