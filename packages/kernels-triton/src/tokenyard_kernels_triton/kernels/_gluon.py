"""The products of an expert layer for Hopper, in Gluon; ``_gluon_pipeline`` says how they work."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from tokenyard_kernels_triton.kernels._activations import function
from tokenyard_kernels_triton.kernels._gluon_loads import (
    arrivals,
    left_slices,
    load_column_tiles,
    load_row_tiles,
    loading_warps,
    registers,
    right_slices,
)
from tokenyard_kernels_triton.kernels._gluon_pipeline import (
    accumulate,
    barriers,
    pass_on,
    piece,
    ragged_at,
    store,
)
from tokenyard_kernels_triton.kernels._schedule import matrix_tile_at, tile_at


@gluon.jit
def _biased(
    tile,
    bias,
    column,
    width,
    PARTS: gl.constexpr,
    COLUMNS: gl.constexpr,
):
    """Add an expert's bias [PARTS * width] to a tile that has the same columns of each part side by side."""
    WIDTH: gl.constexpr = COLUMNS // PARTS
    index = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, tile.type.layout))
    c = column + index % WIDTH
    value = gl.load(bias + index // WIDTH * width + c, mask=c < width, other=0.0)
    return tile + value.to(gl.float32)[None, :]


@gluon.jit
def _activate_and_send(
    total,
    z,
    a_out,
    buffers,
    buffer,
    row,
    end,
    first,
    INDEX: gl.constexpr,
    FUNCTION: gl.constexpr,
    PARTS: gl.constexpr,
    KEEP_Z: gl.constexpr,
    KEEP_A: gl.constexpr,
    COLUMNS: gl.constexpr,
    CHUNK: gl.constexpr,
):
    """Send CHUNK columns of z and of a = act(z) on their way, through PARTS + 1 buffers from `buffer` on."""
    column = first + INDEX * CHUNK
    gate = piece(total, INDEX, COLUMNS, CHUNK).to(a_out.dtype)
    act = function(gate.to(gl.float32), FUNCTION)
    if KEEP_Z:
        buffers.index(buffer).reshape([64, CHUNK]).store(gate)
    if PARTS == 2:
        up = piece(total, INDEX + COLUMNS // PARTS // CHUNK, COLUMNS, CHUNK).to(a_out.dtype)
        act *= up.to(gl.float32)
        if KEEP_Z:
            buffers.index(buffer + 1).reshape([64, CHUNK]).store(up)
    if KEEP_A:
        buffers.index(buffer + PARTS).reshape([64, CHUNK]).store(act.to(a_out.dtype))
    fence_async_shared()
    if KEEP_Z:
        for part in gl.static_range(PARTS):
            store(z, ragged_at(row, end, part, column), buffers.index(buffer + part))
    if KEEP_A:
        store(a_out, ragged_at(row, end, 0, column), buffers.index(buffer + PARTS))


@gluon.jit
def _multiply_up(
    tensors,
    sizes,
    FUNCTION: gl.constexpr,
    PARTS: gl.constexpr,
    BIAS: gl.constexpr,
    KEEP_Z: gl.constexpr,
    KEEP_A: gl.constexpr,
    TOP_K: gl.constexpr,
    WARPGROUP: gl.constexpr,
    DEPTH: gl.constexpr,
    COLUMNS: gl.constexpr,
    CHUNK: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    bias, z, a_out, a, b, full, empty, buffers, tiles = tensors
    dim, ffn_dim = sizes
    WIDTH: gl.constexpr = COLUMNS // PARTS
    columns = gl.cdiv(ffn_dim, WIDTH)
    steps = gl.cdiv(dim, DEPTH)
    done = 0
    sent = 0
    for index in range(gl.program_id(0), gl.load(tiles) * columns, PROGRAMS):
        expert, first, end, n = tile_at(tiles, columns, index, 128)
        row = first + 64 * WARPGROUP
        if row < end:
            total = accumulate(
                a,
                b,
                full,
                empty,
                done,
                steps,
                False,
                False,
                TOP_K > 0,
                WARPGROUP,
                DEPTH,
                COLUMNS,
                STAGES,
            )
            if BIAS:
                total = _biased(
                    total,
                    bias + expert * PARTS * ffn_dim,
                    n * WIDTH,
                    ffn_dim,
                    PARTS,
                    COLUMNS,
                )
            for i in gl.static_range(WIDTH // CHUNK):
                buffer = (BUFFERS * WARPGROUP + sent % BUFFERS) * (PARTS + 1)
                tma.store_wait((BUFFERS - 1) * (PARTS * KEEP_Z + KEEP_A))
                _activate_and_send(
                    total,
                    z,
                    a_out,
                    buffers,
                    buffer,
                    row,
                    end,
                    n * WIDTH,
                    i,
                    FUNCTION,
                    PARTS,
                    KEEP_Z,
                    KEEP_A,
                    COLUMNS,
                    CHUNK,
                )
                sent += 1
        else:
            pass_on(full, empty, done, steps, STAGES)
        done += steps
    tma.store_wait(0)


@gluon.jit
def up_and_activate(
    x,
    order,
    weight,
    bias,
    z,
    a_out,
    tiles,
    dim,
    ffn_dim,
    TOP_K: gl.constexpr,
    FUNCTION: gl.constexpr,
    PARTS: gl.constexpr,
    BIAS: gl.constexpr,
    KEEP_Z: gl.constexpr,
    KEEP_A: gl.constexpr,
    DEPTH: gl.constexpr,
    COLUMNS: gl.constexpr,
    CHUNK: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    """Write z = x @ up.T + bias [R, PARTS * F] and a = act(z) [R, F].

    x are rows; or, with TOP_K, tokens [T, dim] whose rows are collected by their order, in the other products too.
    """
    a = left_slices(x, weight.dtype, TOP_K, DEPTH, STAGES)
    b = gl.allocate_shared_memory(weight.dtype, [STAGES] + weight.block_type.shape, weight.layout)
    sent = gl.allocate_shared_memory(
        weight.dtype, [2 * BUFFERS * (PARTS + 1)] + a_out.block_type.shape, a_out.layout
    )
    full, empty = barriers(STAGES, arrivals(TOP_K)), barriers(STAGES, 2)
    tensors, sizes = (bias, z, a_out, a, b, full, empty, sent, tiles), (dim, ffn_dim)
    operands = (x, order, weight, a, b, full, empty, tiles)
    gl.warp_specialize(
        [
            (
                _multiply_up,
                (
                    tensors,
                    sizes,
                    FUNCTION,
                    PARTS,
                    BIAS,
                    KEEP_Z,
                    KEEP_A,
                    TOP_K,
                    0,
                    DEPTH,
                    COLUMNS,
                    CHUNK,
                    PROGRAMS,
                    STAGES,
                    BUFFERS,
                ),
            ),
            (
                _multiply_up,
                (
                    tensors,
                    sizes,
                    FUNCTION,
                    PARTS,
                    BIAS,
                    KEEP_Z,
                    KEEP_A,
                    TOP_K,
                    1,
                    DEPTH,
                    COLUMNS,
                    CHUNK,
                    PROGRAMS,
                    STAGES,
                    BUFFERS,
                ),
            ),
            (
                load_row_tiles,
                (operands, sizes, PARTS, False, TOP_K, DEPTH, COLUMNS, PROGRAMS, STAGES),
            ),
        ],
        [4, loading_warps(TOP_K)],
        registers(TOP_K),
    )


@gluon.jit
def _multiply_rows(
    tensors,
    sizes,
    B_BY_DEPTH: gl.constexpr,
    BIAS: gl.constexpr,
    TOP_K: gl.constexpr,
    WARPGROUP: gl.constexpr,
    DEPTH: gl.constexpr,
    COLUMNS: gl.constexpr,
    CHUNK: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    bias, out, a, b, full, empty, buffers, tiles = tensors
    depth, width = sizes
    columns = gl.cdiv(width, COLUMNS)
    steps = gl.cdiv(depth, DEPTH)
    done = 0
    sent = 0
    for index in range(gl.program_id(0), gl.load(tiles) * columns, PROGRAMS):
        expert, first, end, n = tile_at(tiles, columns, index, 128)
        row = first + 64 * WARPGROUP
        if row < end:
            total = accumulate(
                a,
                b,
                full,
                empty,
                done,
                steps,
                False,
                B_BY_DEPTH,
                TOP_K > 0,
                WARPGROUP,
                DEPTH,
                COLUMNS,
                STAGES,
            )
            if BIAS:
                total = _biased(
                    total,
                    bias + expert * width,
                    n * COLUMNS,
                    width,
                    1,
                    COLUMNS,
                )
            for i in gl.static_range(COLUMNS // CHUNK):
                tma.store_wait(BUFFERS - 1)
                buffer = buffers.index(BUFFERS * WARPGROUP + sent % BUFFERS)
                buffer.reshape([64, CHUNK]).store(piece(total, i, COLUMNS, CHUNK).to(a.dtype))
                fence_async_shared()
                store(out, ragged_at(row, end, 0, n * COLUMNS + i * CHUNK), buffer)
                sent += 1
        else:
            pass_on(full, empty, done, steps, STAGES)
        done += steps
    tma.store_wait(0)


@gluon.jit
def times_weight(
    left,
    order,
    weight,
    bias,
    out,
    tiles,
    depth,
    width,
    TOP_K: gl.constexpr,
    B_BY_DEPTH: gl.constexpr,
    BIAS: gl.constexpr,
    DEPTH: gl.constexpr,
    COLUMNS: gl.constexpr,
    CHUNK: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    """Write out [R, width] = left [R, depth] @ weight + bias; weight is [depth, width] if B_BY_DEPTH, else transposed."""
    a = left_slices(left, weight.dtype, TOP_K, DEPTH, STAGES)
    b = gl.allocate_shared_memory(weight.dtype, [STAGES] + weight.block_type.shape, weight.layout)
    sent = gl.allocate_shared_memory(weight.dtype, [2 * BUFFERS] + out.block_type.shape, out.layout)
    full, empty = barriers(STAGES, arrivals(TOP_K)), barriers(STAGES, 2)
    tensors, sizes = (bias, out, a, b, full, empty, sent, tiles), (depth, width)
    operands = (left, order, weight, a, b, full, empty, tiles)
    gl.warp_specialize(
        [
            (
                _multiply_rows,
                (
                    tensors,
                    sizes,
                    B_BY_DEPTH,
                    BIAS,
                    TOP_K,
                    0,
                    DEPTH,
                    COLUMNS,
                    CHUNK,
                    PROGRAMS,
                    STAGES,
                    BUFFERS,
                ),
            ),
            (
                _multiply_rows,
                (
                    tensors,
                    sizes,
                    B_BY_DEPTH,
                    BIAS,
                    TOP_K,
                    1,
                    DEPTH,
                    COLUMNS,
                    CHUNK,
                    PROGRAMS,
                    STAGES,
                    BUFFERS,
                ),
            ),
            (
                load_row_tiles,
                (operands, sizes, 1, B_BY_DEPTH, TOP_K, DEPTH, COLUMNS, PROGRAMS, STAGES),
            ),
        ],
        [4, loading_warps(TOP_K)],
        registers(TOP_K),
    )


@gluon.jit
def _multiply_columns(
    tensors,
    sizes,
    TOP_K: gl.constexpr,
    WARPGROUP: gl.constexpr,
    DEPTH: gl.constexpr,
    COLUMNS: gl.constexpr,
    CHUNK: gl.constexpr,
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    out, a, b, full, empty, buffers, offsets, by_rows = tensors
    num_experts, rows, columns = sizes
    m_tiles, n_tiles = gl.cdiv(rows, 128), gl.cdiv(columns, COLUMNS)
    each = m_tiles * n_tiles
    done = 0
    sent = 0
    for index in range(gl.program_id(0), num_experts * each, PROGRAMS):
        expert = gl.load(by_rows + index // each)
        m, n = matrix_tile_at(m_tiles, n_tiles, index % each, GROUP)
        row = m * 128 + WARPGROUP * 64
        steps = gl.cdiv(gl.load(offsets + expert + 1) - gl.load(offsets + expert), DEPTH)
        total = accumulate(
            a,
            b,
            full,
            empty,
            done,
            steps,
            True,
            True,
            TOP_K > 0,
            WARPGROUP,
            DEPTH,
            COLUMNS,
            STAGES,
        )
        for i in gl.static_range(COLUMNS // CHUNK):
            tma.store_wait(BUFFERS - 1)
            buffer = buffers.index(BUFFERS * WARPGROUP + sent % BUFFERS)
            buffer.reshape([64, CHUNK]).store(piece(total, i, COLUMNS, CHUNK).to(a.dtype))
            fence_async_shared()
            store(out, [expert, 0, row, n * COLUMNS + i * CHUNK], buffer)
            sent += 1
        done += steps
    tma.store_wait(0)


@gluon.jit
def weight_gradient(
    left,
    right,
    order,
    out,
    offsets,
    by_rows,
    num_experts,
    rows,
    columns,
    TOP_K: gl.constexpr,
    COLLECT_LEFT: gl.constexpr,
    DEPTH: gl.constexpr,
    COLUMNS: gl.constexpr,
    CHUNK: gl.constexpr,
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    """Write out [E, rows, columns]: over each expert's rows, left [R, rows] transposed times right [R, columns]."""
    a = left_slices(left, out.dtype, TOP_K * COLLECT_LEFT, DEPTH, STAGES)
    b = right_slices(
        right,
        out.dtype,
        TOP_K * (1 - COLLECT_LEFT),
        DEPTH,
        COLUMNS,
        STAGES,
    )
    sent = gl.allocate_shared_memory(out.dtype, [2 * BUFFERS] + out.block_type.shape, out.layout)
    full, empty = barriers(STAGES, arrivals(TOP_K)), barriers(STAGES, 2)
    tensors, sizes = (out, a, b, full, empty, sent, offsets, by_rows), (num_experts, rows, columns)
    operands = (left, right, order, a, b, full, empty, offsets, by_rows)
    gl.warp_specialize(
        [
            (
                _multiply_columns,
                (
                    tensors,
                    sizes,
                    TOP_K,
                    0,
                    DEPTH,
                    COLUMNS,
                    CHUNK,
                    GROUP,
                    PROGRAMS,
                    STAGES,
                    BUFFERS,
                ),
            ),
            (
                _multiply_columns,
                (
                    tensors,
                    sizes,
                    TOP_K,
                    1,
                    DEPTH,
                    COLUMNS,
                    CHUNK,
                    GROUP,
                    PROGRAMS,
                    STAGES,
                    BUFFERS,
                ),
            ),
            (
                load_column_tiles,
                (operands, sizes, TOP_K, COLLECT_LEFT, DEPTH, COLUMNS, GROUP, PROGRAMS, STAGES),
            ),
        ],
        [4, loading_warps(TOP_K)],
        registers(TOP_K),
    )
