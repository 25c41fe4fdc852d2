"""Parts of the FP8 matmuls in Gluon: the main loop, the scales of rows, and the epilogue's stores.

The tensor cores add in about 14 bits. So a slice's sum starts at zero, and is scaled and added to
the total in float32. One warp group adds while the other one multiplies. ``_gluon_fp8`` has the
layout of operands and scales.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tokenyard.fp8 import LARGEST, SMALLEST_SCALE
from tokenyard_kernels_triton.kernels._gluon_pipeline import ragged_at, store

_LARGEST = gl.constexpr(LARGEST)
_SMALLEST_SCALE = gl.constexpr(SMALLEST_SCALE)

# Of a warp group's sum of one half of a tile: 64 rows by 128 columns.
_HALF = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32]))


@gluon.jit
def accumulate(
    a,  # [2 * STAGES, ...] slices of the left operand, one for each warp group
    b,  # [STAGES, ...] slices of the right operand
    full,  # barriers that the loader completes
    empty,  # barriers that the warp groups complete
    done,  # slices consumed before these
    steps,  # slices to sum over
    row_scales,  # [64] pointers to the first scale of each row; a row has `steps` of them
    inside,  # [64], which of the rows exist
    scales,  # pointer to the weight's first scale for the first half
    next_half,  # distance to the scale of the second half
    next_slice,  # distance to the scale of the next slice
    has_second,  # whether the second half exists
    GATHERED: gl.constexpr,  # threads have copied the rows
    WARPGROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Return the sums [64, 128] of both halves of a tile, in float32."""
    first = gl.zeros([64, 128], gl.float32, _HALF)
    second = gl.zeros([64, 128], gl.float32, _HALF)
    part = gl.zeros([64, 128], gl.float32, _HALF)
    for k in range(done, done + steps):
        # The scales are loaded while the slice is on its way.
        step = k - done
        of_rows = gl.load(row_scales + step, mask=inside, other=0.0)  # [64]
        of_first = gl.load(scales + step * next_slice)
        of_second = gl.load(scales + step * next_slice + next_half, mask=has_second, other=0.0)
        stage = k % STAGES
        mbarrier.wait(full.index(stage), (k // STAGES) & 1)
        if GATHERED:
            fence_async_shared()  # make the threads' copies visible to the tensor cores
        left = a.index(2 * stage + WARPGROUP).reshape([64, 128])
        right = b.index(stage).reshape([256, 128])

        # The second wait is redundant. It ties the total to the next matmul: else LLVM moves the
        # additions below that, and 64 more registers are alive.
        half = right.slice(0, 128, 0).permute([1, 0])
        part = warpgroup_mma(left, half, part, use_acc=False, is_async=True)
        part = warpgroup_mma_wait(0, deps=[part])
        first += part * (of_rows * of_first)[:, None]
        part, first = warpgroup_mma_wait(0, deps=[part, first])

        half = right.slice(128, 128, 0).permute([1, 0])
        part = warpgroup_mma(left, half, part, use_acc=False, is_async=True)
        part = warpgroup_mma_wait(0, deps=[part])
        mbarrier.arrive(empty.index(stage))
        second += part * (of_rows * of_second)[:, None]
        part, second = warpgroup_mma_wait(0, deps=[part, second])
    return first, second


@gluon.jit
def rows_of_scales(order, row, end, TOP_K: gl.constexpr):
    """Return the rows [64] of the left operand's scales, and a mask of the rows before `end`."""
    rows = row + gl.arange(0, 64, gl.SliceLayout(1, _HALF))
    inside = rows < end
    if TOP_K:
        return gl.load(order + rows, mask=inside, other=0) // TOP_K, inside
    else:
        return rows, inside


@gluon.jit
def add_bias(tile, bias, column, exists):
    """Add 128 numbers of a bias [width], from `column` on, to a tile [64, 128]."""
    index = gl.arange(0, 128, layout=gl.SliceLayout(0, _HALF))
    value = gl.load(bias + column + index, mask=(index < 128) & exists, other=0.0)
    return tile + value.to(gl.float32)[None, :]


@gluon.jit
def store_half(
    tile,  # [64, 128] float32
    target,  # [R, parts * width]
    scales,  # [R, blocks], if the target is in 8 bits
    blocks,
    buffer,  # [64, 128] in shared memory
    row,
    end,
    part,
    column,  # within the part
    block,  # the column of scales
    exists,  # whether the part has the columns
):
    """Start storing a tile; in 8 bits, quantize it with a scale for each row."""
    if target.dtype.primitive_bitwidth == 8:
        # The largest number ignores NaN, which stays NaN; an infinity makes NaN of its whole block.
        largest = gl.max(gl.abs(tile), 1)  # [64]
        scale = gl.maximum(largest / _LARGEST, _SMALLEST_SCALE)
        rows = row + gl.arange(0, 64, gl.SliceLayout(1, _HALF))
        at = scales + rows.to(gl.int64) * blocks + block
        gl.store(at, scale, mask=(rows < end) & exists)
        tile = tile * (1.0 / scale)[:, None]
    buffer.reshape([64, 128]).store(tile.to(target.dtype))
    fence_async_shared()
    store(target, ragged_at(row, end, part, column), buffer)
