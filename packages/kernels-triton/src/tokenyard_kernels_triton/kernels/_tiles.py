"""Reading and writing tiles of matrices: by the copy engine (tensor descriptors) where strides allow it, else by pointers.

Rows sorted by expert are *ragged*: a tile that reaches past the last row of its expert reads zeros there and writes
nothing. The copy engine does both by itself if the matrix is described with two more dimensions, whose strides add up
to an address that wraps around 2^64: an idea of ``triton.tools.ragged_tma``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

Tile = Tensor | TensorDescriptor
"""What a kernel gets for a matrix: a descriptor of its tiles, or the tensor itself."""

_ROWS = 1 << 30  # more than a ragged matrix has
_MANY = 0x7FFF0000
_WRAP = 1 << 34  # times _ROWS, it is a multiple of 2^64

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on a CPU."""


def describable(*matrices: Tensor) -> bool:
    """Say whether the copy engine can address these matrices: 16-byte rows and addresses."""
    return all(t.shape[-1] * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in matrices)


def ragged(rows: Tensor, parts: int, block: tuple[int, int], tma: bool) -> Tile:
    """Describe rows [R, parts * W], for tiles of `block` rows and columns within one part."""
    if not tma:
        return rows
    width = rows.shape[1]
    shape = [_MANY, _MANY, _ROWS, parts, width // parts]
    strides = [_WRAP - width, width, width, width // parts, 1]
    return TensorDescriptor(rows, shape, strides, [1, 1, block[0], 1, block[1]])


def stacked(weights: Tensor, parts: int, block: tuple[int, int], tma: bool) -> Tile:
    """Describe weights [E, parts * M, N], for tiles of `block` rows of each part and columns."""
    if not tma:
        return weights
    experts, rows, columns = weights.shape
    split = weights.view(experts, parts, rows // parts, columns)
    return TensorDescriptor.from_tensor(split, [1, parts, *block])


@triton.jit
def load_rows(source, row, end, part, column, width, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Read a tile [ROWS, COLUMNS] of a part, `width` columns wide; zero at and past row `end` and column `width`."""
    if TMA:
        many = 0x40000000  # _ROWS
        tile = source.load([many, end, many - (end - row), part, column])
        return tl.reshape(tile, [ROWS, COLUMNS])
    else:
        pointers, mask = _pointers(source, row, end, part, column, width, PARTS, ROWS, COLUMNS)
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_rows(target, tile, row, end, part, column, width, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Write a tile [ROWS, COLUMNS] of a part; nothing at and past row `end` and column `width`."""
    if TMA:
        many = 0x40000000  # _ROWS
        target.store([many, end, many - (end - row), part, column], tl.reshape(tile, [1, 1, ROWS, 1, COLUMNS]))
    else:
        pointers, mask = _pointers(target, row, end, part, column, width, PARTS, ROWS, COLUMNS)
        tl.store(pointers, tile, mask=mask)


@triton.jit
def load_weight(source, expert, row, column, rows, columns, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Read [PARTS * ROWS, COLUMNS]: the same tile of each part, `rows` by `columns`, of an expert's weight."""
    if TMA:
        return tl.reshape(source.load([expert, 0, row, column]), [PARTS * ROWS, COLUMNS])
    else:
        index = tl.arange(0, PARTS * ROWS)
        r, c = row + index % ROWS, column + tl.arange(0, COLUMNS)
        first = (expert.to(tl.int64) * PARTS + index // ROWS) * rows + r
        mask = (r < rows)[:, None] & (c < columns)[None, :]
        return tl.load(source + first[:, None] * columns + c[None, :], mask=mask, other=0.0)


@triton.jit
def store_weight(target, tile, expert, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Write a tile [ROWS, COLUMNS] of an expert's weight, `rows` by `columns`."""
    if TMA:
        target.store([expert, 0, row, column], tl.reshape(tile, [1, 1, ROWS, COLUMNS]))
    else:
        r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        mask = (r < rows)[:, None] & (c < columns)[None, :]
        first = expert.to(tl.int64) * rows + r
        tl.store(target + first[:, None] * columns + c[None, :], tile, mask=mask)


@triton.jit
def _pointers(base, row, end, part, column, width, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    first = (r.to(tl.int64) * PARTS + part) * width
    return base + first[:, None] + c[None, :], (r < end)[:, None] & (c < width)[None, :]


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Split a tile [ROWS, COLUMNS] into its left and its right half; in registers, nothing moves."""
    return tl.split(tl.permute(tl.reshape(tile, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))


@triton.jit
def dot(left, right, total, PRECISION: tl.constexpr):
    """Return total + left @ right, accumulated in float32."""
    if INTERPRETED:  # which would multiply the bits of bfloat16 as integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def rounded(value, TYPE: tl.constexpr):
    """Return float32 values in a narrower type, rounded to nearest even."""
    if INTERPRETED and TYPE == tl.bfloat16:  # which would cut the last bits off
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = bits.to(tl.float32, bitcast=True)
    return value.to(TYPE)
