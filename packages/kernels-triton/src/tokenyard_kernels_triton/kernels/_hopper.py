"""The products of an expert layer for Hopper, in Gluon: a warp that loads, and two warpgroups that multiply.

Each program walks over output tiles of 128 rows, 64 for each warpgroup, and COLUMNS columns. The loader runs ahead by
STAGES slices of what is summed over, across tiles, so that the next tile's operands are there when a tile is done. The
warpgroups do not wait for each other; where a tile's rows end before those of the second one begin, it only passes its
slices on, so that an expert's rows cost what they would if padded to 64. Results leave by the copy engine through
BUFFERS small buffers of each warpgroup, CHUNK columns at a time.

Operands and results are tensor descriptors. Rows sorted by expert are *ragged*: a box that reaches past the last row of
its expert reads zeros there and writes nothing. The copy engine does both by itself if the matrix is described with two
more dimensions, whose strides add up to an address that wraps around 2^64: an idea of ``triton.tools.ragged_tma``. So
rows are described as [., ., R, part, W], and weights as [E, part, M, N].
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

_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # as Triton 3.6 calls it
_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def function(z, FUNCTION: gl.constexpr):
    """Return f(z); see ``_activations``."""
    if FUNCTION == "silu":
        return z / (1.0 + gl.exp(-z))
    elif FUNCTION == "gelu":
        return 0.5 * z * (1.0 + gl.erf(z * 0.7071067811865476))
    elif FUNCTION == "gelu_tanh":
        return z / (1.0 + gl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
    elif FUNCTION == "relu":
        return gl.maximum(z, 0.0)
    else:
        gl.static_assert(FUNCTION == "relu_squared")
        positive = gl.maximum(z, 0.0)
        return positive * positive


@gluon.jit
def _tile_at(tiles, columns, index):
    """Return (expert, row, end, column tile) of the index-th output tile; see ``_schedule``."""
    entry = tiles + 1 + 5 * (index // columns)
    first, size = gl.load(entry + 3), gl.load(entry + 4)
    place = index - first * columns
    return gl.load(entry), gl.load(entry + 1) + place % size * 128, gl.load(entry + 2), place // size


@gluon.jit
def _matrix_tile_at(rows, columns, index, GROUP: gl.constexpr):
    in_group = index % (GROUP * columns)
    first = index // (GROUP * columns) * GROUP
    size = gl.minimum(rows - first, GROUP)
    return first + in_group % size, in_group // size


@gluon.jit
def _ragged_at(row, end, part, column):
    many = 0x40000000
    return [many, end, many - (end - row), part, column]


@gluon.jit
def _barriers(STAGES: gl.constexpr, COUNT: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=COUNT)
    return bars


@gluon.jit
def _accumulate(a, b, full, empty, done, steps, A_BY_DEPTH: gl.constexpr, B_BY_DEPTH: gl.constexpr, WARPGROUP: gl.constexpr, DEPTH: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr):
    """Return the sum [64, COLUMNS] of the products of `steps` slices, after `done` ones.

    BY_DEPTH: the first dimension of a slice is what is summed over.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    total = gl.zeros([64, COLUMNS], gl.float32, layout)
    for k in range(done, done + steps):
        stage = k % STAGES
        mbarrier.wait(full.index(stage), (k // STAGES) & 1)
        left, right = a.index(2 * stage + WARPGROUP), b.index(stage)
        if A_BY_DEPTH:
            left = left.reshape([DEPTH, 64]).permute([1, 0])
        else:
            left = left.reshape([64, DEPTH])
        if B_BY_DEPTH:
            right = right.reshape([DEPTH, COLUMNS])
        else:
            right = right.reshape([COLUMNS, DEPTH]).permute([1, 0])
        total = warpgroup_mma(left, right, total, is_async=True)
        total = warpgroup_mma_wait(1, deps=[total])
        mbarrier.arrive(empty.index((k + STAGES - 1) % STAGES), pred=k > done)
    total = warpgroup_mma_wait(0, deps=[total])
    mbarrier.arrive(empty.index((done + steps + STAGES - 1) % STAGES), pred=steps > 0)
    return total


@gluon.jit
def _pass_on(full, empty, done, steps, STAGES: gl.constexpr):
    """Let `steps` slices go unused, after `done` ones."""
    for k in range(done, done + steps):
        mbarrier.wait(full.index(k % STAGES), (k // STAGES) & 1)
        mbarrier.arrive(empty.index(k % STAGES))


@gluon.jit
def _halves(tile, COLUMNS: gl.constexpr):
    return tile.reshape([64, 2, COLUMNS // 2]).permute([0, 2, 1]).split()


@gluon.jit
def _piece(tile, INDEX: gl.constexpr, COLUMNS: gl.constexpr, CHUNK: gl.constexpr):
    """Return the INDEX-th CHUNK columns of a tile [64, COLUMNS]; nothing moves."""
    if COLUMNS == CHUNK:
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
        return gl.convert_layout(tile, layout, assert_trivial=True)
    else:
        one, two = _halves(tile, COLUMNS)
        HALF: gl.constexpr = COLUMNS // 2
        if INDEX * CHUNK < HALF:
            return _piece(one, INDEX, HALF, CHUNK)
        else:
            return _piece(two, INDEX - HALF // CHUNK, HALF, CHUNK)


@gluon.jit
def _load_slice(left, weight, at_left, at_weight, a, b, full, empty, done, AXIS: gl.constexpr, STAGES: gl.constexpr):
    """Load the operands of one slice: for each warpgroup a box of `left`, 64 further along AXIS, and one of weight."""
    stage = done % STAGES
    ready = full.index(stage)
    mbarrier.wait(empty.index(stage), ((done // STAGES) & 1) ^ 1)
    mbarrier.expect(ready, 2 * left.block_type.nbytes + weight.block_type.nbytes)
    for half in gl.static_range(2):
        at = at_left
        if AXIS == 2:
            at = [at[0], at[1], at[2] + 64 * half, at[3], at[4]]
        else:
            at = [at[0], at[1], at[2], at[3], at[4] + 64 * half]
        _load(left, at, ready, a.index(2 * stage + half))
    _load(weight, at_weight, ready, b.index(stage))
    return done + 1


@gluon.jit
def _load_row_tiles(operands, sizes, PARTS: gl.constexpr, B_BY_DEPTH: gl.constexpr, DEPTH: gl.constexpr, COLUMNS: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr):
    """Load the slices of every tile of rows times weight."""
    left, weight, a, b, full, empty, tiles = operands
    depth, width = sizes
    columns = gl.cdiv(width, COLUMNS // PARTS)
    done = 0
    for index in range(gl.program_id(0), gl.load(tiles) * columns, PROGRAMS):
        expert, row, end, n = _tile_at(tiles, columns, index)
        column = n * (COLUMNS // PARTS)
        for k in range(0, depth, DEPTH):
            if B_BY_DEPTH:
                at = [expert, 0, k, column]
            else:
                at = [expert, 0, column, k]
            done = _load_slice(left, weight, _ragged_at(row, end, 0, k), at, a, b, full, empty, done, 2, STAGES)


@gluon.jit
def _load_column_tiles(operands, sizes, DEPTH: gl.constexpr, COLUMNS: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr):
    """Load the slices of every tile of a weight gradient."""
    left, right, a, b, full, empty, offsets, by_rows = operands
    num_experts, rows, columns = sizes
    m_tiles, n_tiles = gl.cdiv(rows, 128), gl.cdiv(columns, COLUMNS)
    each = m_tiles * n_tiles
    done = 0
    for index in range(gl.program_id(0), num_experts * each, PROGRAMS):
        expert = gl.load(by_rows + index // each)
        m, n = _matrix_tile_at(m_tiles, n_tiles, index % each, GROUP)
        end = gl.load(offsets + expert + 1)
        for k in range(gl.load(offsets + expert), end, DEPTH):
            at, other = _ragged_at(k, end, 0, m * 128), _ragged_at(k, end, 0, n * COLUMNS)
            done = _load_slice(left, right, at, other, a, b, full, empty, done, 4, STAGES)


@gluon.jit
def _biased(tile, bias, column, width, PARTS: gl.constexpr, COLUMNS: gl.constexpr):
    """Add an expert's bias [PARTS * width] to a tile that has the same columns of each part side by side."""
    WIDTH: gl.constexpr = COLUMNS // PARTS
    index = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, tile.type.layout))
    c = column + index % WIDTH
    value = gl.load(bias + index // WIDTH * width + c, mask=c < width, other=0.0)
    return tile + value.to(gl.float32)[None, :]


@gluon.jit
def _multiply_up(tensors, sizes, FUNCTION: gl.constexpr, PARTS: gl.constexpr, BIAS: gl.constexpr, KEEP_Z: gl.constexpr, KEEP_A: gl.constexpr, WARPGROUP: gl.constexpr, DEPTH: gl.constexpr, COLUMNS: gl.constexpr, CHUNK: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr):
    bias, z, a_out, a, b, full, empty, buffers, tiles = tensors
    dim, ffn_dim = sizes
    WIDTH: gl.constexpr = COLUMNS // PARTS
    SENT: gl.constexpr = PARTS + 1
    columns = gl.cdiv(ffn_dim, WIDTH)
    steps = gl.cdiv(dim, DEPTH)
    done = 0
    sent = 0
    for index in range(gl.program_id(0), gl.load(tiles) * columns, PROGRAMS):
        expert, first, end, n = _tile_at(tiles, columns, index)
        row = first + 64 * WARPGROUP
        if row < end:
            total = _accumulate(a, b, full, empty, done, steps, False, False, WARPGROUP, DEPTH, COLUMNS, STAGES)
            if BIAS:
                total = _biased(total, bias + expert * PARTS * ffn_dim, n * WIDTH, ffn_dim, PARTS, COLUMNS)
            for i in gl.static_range(WIDTH // CHUNK):
                column = n * WIDTH + i * CHUNK
                buffer = (BUFFERS * WARPGROUP + sent % BUFFERS) * SENT
                tma.store_wait((BUFFERS - 1) * (PARTS * KEEP_Z + KEEP_A))
                gate = _piece(total, i, COLUMNS, CHUNK).to(a.dtype)
                act = function(gate.to(gl.float32), FUNCTION)
                if KEEP_Z:
                    buffers.index(buffer).reshape([64, CHUNK]).store(gate)
                if PARTS == 2:
                    up = _piece(total, i + WIDTH // CHUNK, COLUMNS, CHUNK).to(a.dtype)
                    act *= up.to(gl.float32)
                    if KEEP_Z:
                        buffers.index(buffer + 1).reshape([64, CHUNK]).store(up)
                if KEEP_A:
                    buffers.index(buffer + PARTS).reshape([64, CHUNK]).store(act.to(a.dtype))
                fence_async_shared()
                if KEEP_Z:
                    for part in gl.static_range(PARTS):
                        at = _ragged_at(row, end, part, column)
                        _store(z, at, buffers.index(buffer + part))
                if KEEP_A:
                    at = _ragged_at(row, end, 0, column)
                    _store(a_out, at, buffers.index(buffer + PARTS))
                sent += 1
        else:
            _pass_on(full, empty, done, steps, STAGES)
        done += steps
    tma.store_wait(0)


@gluon.jit
def up_and_activate(
    x, weight, bias, z, a_out, tiles, dim, ffn_dim,
    FUNCTION: gl.constexpr, PARTS: gl.constexpr, BIAS: gl.constexpr, KEEP_Z: gl.constexpr, KEEP_A: gl.constexpr,
    DEPTH: gl.constexpr, COLUMNS: gl.constexpr, CHUNK: gl.constexpr, PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr, BUFFERS: gl.constexpr,
):
    """Write z = x @ up.T + bias [R, PARTS * F] and a = act(z) [R, F]."""
    a = gl.allocate_shared_memory(x.dtype, [2 * STAGES] + x.block_type.shape, x.layout)
    b = gl.allocate_shared_memory(x.dtype, [STAGES] + weight.block_type.shape, weight.layout)
    sent = gl.allocate_shared_memory(x.dtype, [2 * BUFFERS * (PARTS + 1)] + a_out.block_type.shape, a_out.layout)
    full, empty = _barriers(STAGES, 1), _barriers(STAGES, 2)
    tensors, sizes = (bias, z, a_out, a, b, full, empty, sent, tiles), (dim, ffn_dim)
    operands = (x, weight, a, b, full, empty, tiles)
    gl.warp_specialize(
        [
            (_multiply_up, (tensors, sizes, FUNCTION, PARTS, BIAS, KEEP_Z, KEEP_A, 0, DEPTH, COLUMNS, CHUNK, PROGRAMS, STAGES, BUFFERS)),
            (_multiply_up, (tensors, sizes, FUNCTION, PARTS, BIAS, KEEP_Z, KEEP_A, 1, DEPTH, COLUMNS, CHUNK, PROGRAMS, STAGES, BUFFERS)),
            (_load_row_tiles, (operands, sizes, PARTS, False, DEPTH, COLUMNS, PROGRAMS, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _multiply_rows(tensors, sizes, B_BY_DEPTH: gl.constexpr, BIAS: gl.constexpr, WARPGROUP: gl.constexpr, DEPTH: gl.constexpr, COLUMNS: gl.constexpr, CHUNK: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr):
    bias, out, a, b, full, empty, buffers, tiles = tensors
    depth, width = sizes
    columns = gl.cdiv(width, COLUMNS)
    steps = gl.cdiv(depth, DEPTH)
    done = 0
    sent = 0
    for index in range(gl.program_id(0), gl.load(tiles) * columns, PROGRAMS):
        expert, first, end, n = _tile_at(tiles, columns, index)
        row = first + 64 * WARPGROUP
        if row < end:
            total = _accumulate(a, b, full, empty, done, steps, False, B_BY_DEPTH, WARPGROUP, DEPTH, COLUMNS, STAGES)
            if BIAS:
                total = _biased(total, bias + expert * width, n * COLUMNS, width, 1, COLUMNS)
            for i in gl.static_range(COLUMNS // CHUNK):
                tma.store_wait(BUFFERS - 1)
                buffer = buffers.index(BUFFERS * WARPGROUP + sent % BUFFERS)
                buffer.reshape([64, CHUNK]).store(_piece(total, i, COLUMNS, CHUNK).to(a.dtype))
                fence_async_shared()
                _store(out, _ragged_at(row, end, 0, n * COLUMNS + i * CHUNK), buffer)
                sent += 1
        else:
            _pass_on(full, empty, done, steps, STAGES)
        done += steps
    tma.store_wait(0)


@gluon.jit
def times_weight(
    left, weight, bias, out, tiles, depth, width,
    B_BY_DEPTH: gl.constexpr, BIAS: gl.constexpr,
    DEPTH: gl.constexpr, COLUMNS: gl.constexpr, CHUNK: gl.constexpr, PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr, BUFFERS: gl.constexpr,
):
    """Write out [R, width] = left [R, depth] @ weight + bias; weight is [depth, width] if B_BY_DEPTH, else transposed."""
    a = gl.allocate_shared_memory(left.dtype, [2 * STAGES] + left.block_type.shape, left.layout)
    b = gl.allocate_shared_memory(left.dtype, [STAGES] + weight.block_type.shape, weight.layout)
    sent = gl.allocate_shared_memory(left.dtype, [2 * BUFFERS] + out.block_type.shape, out.layout)
    full, empty = _barriers(STAGES, 1), _barriers(STAGES, 2)
    tensors, sizes = (bias, out, a, b, full, empty, sent, tiles), (depth, width)
    operands = (left, weight, a, b, full, empty, tiles)
    gl.warp_specialize(
        [
            (_multiply_rows, (tensors, sizes, B_BY_DEPTH, BIAS, 0, DEPTH, COLUMNS, CHUNK, PROGRAMS, STAGES, BUFFERS)),
            (_multiply_rows, (tensors, sizes, B_BY_DEPTH, BIAS, 1, DEPTH, COLUMNS, CHUNK, PROGRAMS, STAGES, BUFFERS)),
            (_load_row_tiles, (operands, sizes, 1, B_BY_DEPTH, DEPTH, COLUMNS, PROGRAMS, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _multiply_columns(tensors, sizes, WARPGROUP: gl.constexpr, DEPTH: gl.constexpr, COLUMNS: gl.constexpr, CHUNK: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr):
    out, a, b, full, empty, buffers, offsets, by_rows = tensors
    num_experts, rows, columns = sizes
    m_tiles, n_tiles = gl.cdiv(rows, 128), gl.cdiv(columns, COLUMNS)
    each = m_tiles * n_tiles
    done = 0
    sent = 0
    for index in range(gl.program_id(0), num_experts * each, PROGRAMS):
        expert = gl.load(by_rows + index // each)
        m, n = _matrix_tile_at(m_tiles, n_tiles, index % each, GROUP)
        row = m * 128 + WARPGROUP * 64
        steps = gl.cdiv(gl.load(offsets + expert + 1) - gl.load(offsets + expert), DEPTH)
        total = _accumulate(a, b, full, empty, done, steps, True, True, WARPGROUP, DEPTH, COLUMNS, STAGES)
        for i in gl.static_range(COLUMNS // CHUNK):
            tma.store_wait(BUFFERS - 1)
            buffer = buffers.index(BUFFERS * WARPGROUP + sent % BUFFERS)
            buffer.reshape([64, CHUNK]).store(_piece(total, i, COLUMNS, CHUNK).to(a.dtype))
            fence_async_shared()
            _store(out, [expert, 0, row, n * COLUMNS + i * CHUNK], buffer)
            sent += 1
        done += steps
    tma.store_wait(0)


@gluon.jit
def weight_gradient(
    left, right, out, offsets, by_rows, num_experts, rows, columns,
    DEPTH: gl.constexpr, COLUMNS: gl.constexpr, CHUNK: gl.constexpr, GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr,
):
    """Write out [E, rows, columns]: over each expert's rows, left [R, rows] transposed times right [R, columns]."""
    a = gl.allocate_shared_memory(left.dtype, [2 * STAGES] + left.block_type.shape, left.layout)
    b = gl.allocate_shared_memory(left.dtype, [STAGES] + right.block_type.shape, right.layout)
    sent = gl.allocate_shared_memory(left.dtype, [2 * BUFFERS] + out.block_type.shape, out.layout)
    full, empty = _barriers(STAGES, 1), _barriers(STAGES, 2)
    tensors, sizes = (out, a, b, full, empty, sent, offsets, by_rows), (num_experts, rows, columns)
    operands = (left, right, a, b, full, empty, offsets, by_rows)
    gl.warp_specialize(
        [
            (_multiply_columns, (tensors, sizes, 0, DEPTH, COLUMNS, CHUNK, GROUP, PROGRAMS, STAGES, BUFFERS)),
            (_multiply_columns, (tensors, sizes, 1, DEPTH, COLUMNS, CHUNK, GROUP, PROGRAMS, STAGES, BUFFERS)),
            (_load_column_tiles, (operands, sizes, DEPTH, COLUMNS, GROUP, PROGRAMS, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
