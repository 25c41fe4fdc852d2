"""The pipeline that the matmuls for Hopper GPUs share, in Gluon: a loader and two warp groups.

Each program walks over output tiles of 128 rows, 64 for each warp group, and COLUMNS columns. The
reduction dimension is cut into slices of DEPTH. The loader runs up to STAGES slices ahead, across
tiles, so that the next tile's operands are loaded when a tile is done. The warp groups do not wait
for each other. If a tile has no rows for the second warp group, that group only releases the tile's
slices, so an expert's rows cost as much as if they were padded to 64.

Results leave by TMA. Each warp group has BUFFERS buffers of CHUNK columns for them.

Operands and results are tensor descriptors. Rows sorted by expert are *ragged*: a box that reaches
past the last row of its expert reads zeros there and writes nothing. TMA does both if the matrix is
described with two more dimensions, whose strides add up to an address that wraps around 2^64 (the
idea of ``triton.tools.ragged_tma``). So rows are described as [., ., R, part, W], and weights as
[E, part, M, N].
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Triton 3.6 has the second names only.
load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gl._core.builtin
def _add(descriptor, at, buffer, _semantic=None):
    """Add a buffer to a box of global memory; Triton 3.6 has no name for it."""
    kind = gl._core.ir.DESCRIPTOR_REDUCE_KIND.ADD
    coordinates = _semantic._convert_to_ir_values(at, require_i64=False)
    builder = _semantic.builder
    builder.create_async_tma_reduce(kind, descriptor.handle, coordinates, buffer.handle)


add = getattr(tma, "async_atomic_add", None) or _add


@gluon.jit
def ragged_at(row, end, part, column):
    """Return the coordinates of a box of ragged rows that begins at `row` and ends before `end`."""
    many = 0x40000000
    return [many, end, many - (end - row), part, column]


@gluon.jit
def barriers(STAGES: gl.constexpr, COUNT: gl.constexpr):
    """Allocate a barrier for each stage, which COUNT arrivals complete."""
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=COUNT)
    return bars


@gluon.jit
def accumulate(
    a,  # [2 * STAGES, ...] slices of the left operand, one for each warp group
    b,  # [STAGES, ...] slices of the right operand
    full,  # barriers that the loader completes
    empty,  # barriers that the warp groups complete
    done,  # slices consumed before these
    steps,  # slices to sum over
    A_BY_DEPTH: gl.constexpr,  # the first dimension of a left slice is the reduction dimension
    B_BY_DEPTH: gl.constexpr,  # the first dimension of a right slice is the reduction dimension
    GATHERED: gl.constexpr,  # threads have copied one of the operands
    WARPGROUP: gl.constexpr,
    DEPTH: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Return the sum [64, COLUMNS] of the matmuls of `steps` slices, in float32."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    total = gl.zeros([64, COLUMNS], gl.float32, layout)
    for k in range(done, done + steps):
        stage = k % STAGES
        mbarrier.wait(full.index(stage), (k // STAGES) & 1)
        if GATHERED:
            fence_async_shared()  # make the threads' copies visible to the tensor cores

        # View the slices as [64, DEPTH] and [DEPTH, COLUMNS].
        left = a.index(2 * stage + WARPGROUP)
        right = b.index(stage)
        if A_BY_DEPTH:
            left = left.reshape([DEPTH, 64]).permute([1, 0])
        else:
            left = left.reshape([64, DEPTH])
        if B_BY_DEPTH:
            right = right.reshape([DEPTH, COLUMNS])
        else:
            right = right.reshape([COLUMNS, DEPTH]).permute([1, 0])

        # Keep one matmul in flight, and release the slice of the one before it.
        total = warpgroup_mma(left, right, total, is_async=True)
        total = warpgroup_mma_wait(1, deps=[total])
        mbarrier.arrive(empty.index((k + STAGES - 1) % STAGES), pred=k > done)

    # Drain: wait for the last matmul and release its slice.
    total = warpgroup_mma_wait(0, deps=[total])
    mbarrier.arrive(empty.index((done + steps + STAGES - 1) % STAGES), pred=steps > 0)
    return total


@gluon.jit
def skip_slices(full, empty, done, steps, STAGES: gl.constexpr):
    """Release `steps` slices unused, after `done` ones."""
    for k in range(done, done + steps):
        mbarrier.wait(full.index(k % STAGES), (k // STAGES) & 1)
        mbarrier.arrive(empty.index(k % STAGES))


@gluon.jit
def _halves(tile, COLUMNS: gl.constexpr):
    return tile.reshape([64, 2, COLUMNS // 2]).permute([0, 2, 1]).split()


@gluon.jit
def add_bias(
    tile,  # [64, CHUNK] float32
    bias,  # [width] of the tile's expert
    column,  # the tile's first column
    width,
    CHUNK: gl.constexpr,
):
    """Add the bias to a tile."""
    c = column + gl.arange(0, CHUNK, layout=gl.SliceLayout(0, tile.type.layout))
    value = gl.load(bias + c, mask=c < width, other=0.0)
    return tile + value.to(gl.float32)[None, :]


@gluon.jit
def take_chunk(tile, INDEX: gl.constexpr, COLUMNS: gl.constexpr, CHUNK: gl.constexpr):
    """Return chunk INDEX [64, CHUNK] of a tile [64, COLUMNS]; no data moves between threads."""
    if COLUMNS == CHUNK:
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
        return gl.convert_layout(tile, layout, assert_trivial=True)
    else:
        # Halve the columns until one half is the chunk.
        one, two = _halves(tile, COLUMNS)
        HALF: gl.constexpr = COLUMNS // 2
        if INDEX * CHUNK < HALF:
            return take_chunk(one, INDEX, HALF, CHUNK)
        else:
            return take_chunk(two, INDEX - HALF // CHUNK, HALF, CHUNK)


@gluon.jit
def round_pairs(tile, dtype: gl.constexpr):
    """Return a float32 tile in bfloat16 or float16, rounded to nearest even.

    The same as ``tile.to(dtype)``, which LLVM sometimes compiles to one slow instruction a number.
    """
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [tile], gl.bfloat16, True, 2
        )
    else:
        gl.static_assert(dtype == gl.float16)
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [tile], gl.float16, True, 2
        )


@gluon.jit
def round_and_widen(tile, dtype: gl.constexpr):
    """Return a float32 tile in bfloat16 or float16, as `round_pairs` does, and that in float32.

    In bfloat16 this takes fewer instructions than a conversion of the rounded tile.
    """
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            """{
            .reg .b32 low, high;
            cvt.rn.bf16x2.f32 $0, $4, $3;
            shl.b32 low, $0, 16;
            and.b32 high, $0, 0xFFFF0000;
            mov.b32 $1, low;
            mov.b32 $2, high;
            }""",
            "=r,=f,=f,f,f",
            [tile],
            (gl.bfloat16, gl.float32),
            True,
            2,
        )
    else:
        rounded = round_pairs(tile, dtype)
        return rounded, rounded.to(gl.float32)
