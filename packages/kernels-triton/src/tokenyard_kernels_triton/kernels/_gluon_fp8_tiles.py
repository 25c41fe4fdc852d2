"""Parts of the FP8 matmuls in Gluon: the main loop, the scales of rows, and the epilogue's stores.

The tensor cores add in about 14 bits. So a slice's sum starts at zero, and is scaled and added to
the total in float32. A warp group computes 64 columns at a time: while it adds one sum, the next is
in flight. The left operand is in registers, because shared memory is too slow to read it four times
a slice. ``_gluon_fp8_up`` has the layout of operands and scales.
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

# Of a warp group's sums: 64 rows by 128 columns, or by 64.
HALF = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32]))
_QUARTER = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32]))
_LEFT = gl.constexpr(gl.DotOperandLayout(0, _QUARTER, 4))


@gluon.constexpr_function
def registers(TOP_K):
    """Return the registers per thread: of the second warp group, and of the loader."""
    return [232, 40] if TOP_K else [240, 24]


@gluon.jit
def accumulate(
    a,  # [2 * STAGES, ...] slices of the left operand, one for each warp group
    b,  # [STAGES, ...] slices of the right operand
    full,  # barriers that the loader completes
    empty,  # barriers that the warp groups complete
    done,  # slices consumed before these
    steps,  # slices to sum over
    row_scales,
    rows,  # [64] offsets of the first scale of each row; a row has `steps` of them
    scales,  # of the weight
    column,  # offset of the weight's first scale for the first half
    next_half,  # distance to the scale of the second half
    next_slice,  # distance to the scale of the next slice
    WARPGROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Return the sums [64, 128] of both halves of a tile, in float32."""
    total_0 = gl.zeros([64, 64], gl.float32, _QUARTER)
    total_1 = gl.zeros([64, 64], gl.float32, _QUARTER)
    total_2 = gl.zeros([64, 64], gl.float32, _QUARTER)
    total_3 = gl.zeros([64, 64], gl.float32, _QUARTER)
    one = gl.zeros([64, 64], gl.float32, _QUARTER)
    two = gl.zeros([64, 64], gl.float32, _QUARTER)
    rows = gl.convert_layout(rows, gl.SliceLayout(1, _QUARTER))
    next_rows, next_first, next_second = _scales_at(
        0, steps, row_scales, rows, scales, column, next_half, next_slice
    )
    of_last = gl.zeros([64], gl.float32, gl.SliceLayout(1, _QUARTER))
    for k in range(done, done + steps):
        stage = k % STAGES
        mbarrier.wait(full.index(stage), (k // STAGES) & 1)
        left = a.index(2 * stage + WARPGROUP).reshape([64, 128]).load(_LEFT)
        right = b.index(stage).reshape([256, 128])

        # Two matmuls are in flight. The second wait of each pair is redundant: it ties the total to
        # the next matmul. Else LLVM moves the additions below that, and more registers are alive.
        # The last sum of a slice is added when the next slice's first matmul has started.
        one = _multiply(left, right, 0, one)
        two = warpgroup_mma_wait(1, deps=[two])
        total_3 += two * of_last[:, None]
        two, total_3 = warpgroup_mma_wait(1, deps=[two, total_3])

        # Load the next slice's scales while this one is multiplied.
        two = _multiply(left, right, 1, two)
        of_first = next_rows * next_first  # [64]
        of_last = next_rows * next_second
        next_rows, next_first, next_second = _scales_at(
            k - done + 1, steps, row_scales, rows, scales, column, next_half, next_slice
        )
        one = warpgroup_mma_wait(1, deps=[one])
        total_0 += one * of_first[:, None]
        one, total_0 = warpgroup_mma_wait(1, deps=[one, total_0])

        one = _multiply(left, right, 2, one)
        two = warpgroup_mma_wait(1, deps=[two])
        total_1 += two * of_first[:, None]
        two, total_1 = warpgroup_mma_wait(1, deps=[two, total_1])

        two = _multiply(left, right, 3, two)
        one = warpgroup_mma_wait(1, deps=[one])
        total_2 += one * of_last[:, None]
        one, total_2 = warpgroup_mma_wait(1, deps=[one, total_2])

        two = warpgroup_mma_wait(0, deps=[two])
        mbarrier.arrive(empty.index(stage))
    total_3 += two * of_last[:, None]
    return _side_by_side(total_0, total_1), _side_by_side(total_2, total_3)


@gluon.jit
def _scales_at(step, steps, row_scales, rows, scales, column, next_half, next_slice):
    """Return a slice's scales: [64] of the rows, and both of the weight.

    They are those of the last slice if there is no such slice.
    """
    step = gl.minimum(step, gl.maximum(steps - 1, 0))
    column += step * next_slice
    first = gl.load(scales + column)
    return gl.load(row_scales + (rows + step)), first, gl.load(scales + (column + next_half))


@gluon.jit
def _multiply(left, right, QUARTER: gl.constexpr, total):
    """Start left [64, 128] @ 64 rows of right [256, 128] transposed; `total` gives registers."""
    columns = right.slice(64 * QUARTER, 64, 0).permute([1, 0])
    return warpgroup_mma(left, columns, total, use_acc=False, is_async=True)


@gluon.jit
def _side_by_side(one, two):
    """Return two quarters of a tile as one half [64, 128]; no data moves between threads."""
    both = gl.join(one, two).permute([0, 2, 1]).reshape([64, 128])
    return gl.convert_layout(both, HALF, assert_trivial=True)


@gluon.jit
def rows_of_scales(order, row, end, TOP_K: gl.constexpr):
    """Return the rows [64] of the left operand's scales; the last row stands for those after it."""
    rows = gl.minimum(row + gl.arange(0, 64, gl.SliceLayout(1, HALF)), end - 1)
    if TOP_K:
        return gl.load(order + rows) // TOP_K
    else:
        return rows


@gluon.jit
def add_bias(tile, bias, column, exists):
    """Add 128 numbers of a bias [width], from `column` on, to a tile [64, 128]."""
    index = gl.arange(0, 128, layout=gl.SliceLayout(0, HALF))
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
        rows = row + gl.arange(0, 64, gl.SliceLayout(1, HALF))
        at = scales + rows.to(gl.int64) * blocks + block
        gl.store(at, scale, mask=(rows < end) & exists)
        tile = tile * (1.0 / scale)[:, None]
    buffer.reshape([64, 128]).store(tile.to(target.dtype))
    fence_async_shared()
    store(target, ragged_at(row, end, part, column), buffer)
