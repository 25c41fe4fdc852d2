"""Launches of the moves between tokens and rows. Each function allocates its result."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from tokenyard.interfaces import Plan
from tokenyard_kernels_cuda.ops._sizes import WARP, ceil_div, round_up
from tokenyard_kernels_cuda.toolchain import Array, Int, Kernel, Parameters, Source

ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "float"}
"""The element type of the kernels for each dtype."""

_THREADS = 256  # threads per block, at most
_TAIL = 64  # blocks that clear the tail, which is usually empty
_BYTES = 16  # bytes that a thread moves at a time


class MoveKernels(NamedTuple):
    """The kernels for one dtype that move `vector` elements at a time."""

    vector: int
    to_rows: Kernel
    to_tokens: Kernel
    to_tokens_backward: Kernel

    def kernels(self) -> tuple[Kernel, ...]:
        """Return the kernels without `vector`."""
        return self[1:]


@cache
def move_kernels(dtype: torch.dtype, vector: int) -> MoveKernels:
    """Return the kernels that move `vector` elements of a dtype at a time."""
    source = Source("moves.cu", (("ELEMENT", ELEMENTS[dtype]), ("VECTOR", str(vector))))
    rows = Array(dtype)
    optional_rows = Array(dtype, optional=True)
    optional_floats = Array(torch.float32, optional=True)
    plan: Parameters = {"inverse": Array(torch.int32), "live": Array(torch.int32)}
    sizes: Parameters = {"vectors": Int(), "bound": Int(), "top_k": Int()}
    to_rows = Kernel(source, "to_rows", x=rows, **plan, rows=rows, tokens=Int(), **sizes)
    to_tokens = Kernel(
        source, "to_tokens", rows=rows, weights=optional_floats, **plan, y=rows, **sizes
    )
    backward = Kernel(
        source,
        "to_tokens_backward",
        dy=rows,
        rows=optional_rows,
        weights=optional_floats,
        **plan,
        drows=optional_rows,
        dweights=optional_floats,
        slots=Int(),
        **sizes,
    )
    return MoveKernels(vector, to_rows, to_tokens, backward)


def vectors_of(dtype: torch.dtype) -> tuple[int, int]:
    """Return the elements that a thread moves at a time: 16 bytes if aligned, else 1 element."""
    return _BYTES // dtype.itemsize, 1


def to_rows(x: Tensor, plan: Plan) -> Tensor:
    """Copy tokens x [T, D] to rows [R, D]; the tail is zero."""
    tokens, dim = x.shape
    rows = x.new_empty(plan.order.shape[0], dim)
    kernels = _kernels_for(x)
    vectors = dim // kernels.vector
    threads, column_blocks = _columns(vectors)
    kernels.to_rows(
        (tokens + _TAIL, column_blocks),
        threads,
        x,
        plan.inverse,
        _live(plan),
        rows,
        tokens,
        vectors,
        len(rows),
        plan.top_k,
    )
    return rows


def to_tokens(rows: Tensor, plan: Plan, topk_weights: Tensor | None) -> Tensor:
    """Sum each token's rows [R, D] to [T, D], in float32.

    Rows are weighted by topk_weights [T, K] unless None.
    """
    bound, dim = rows.shape
    tokens = plan.inverse.shape[0] // plan.top_k
    y = rows.new_empty(tokens, dim)
    kernels = _kernels_for(rows)
    vectors = dim // kernels.vector
    threads, column_blocks = _columns(vectors)
    kernels.to_tokens(
        (tokens, column_blocks),
        threads,
        rows,
        topk_weights,
        plan.inverse,
        _live(plan),
        y,
        vectors,
        bound,
        plan.top_k,
    )
    return y


def to_tokens_backward(
    dy: Tensor, rows: Tensor | None, topk_weights: Tensor | None, plan: Plan, want_rows: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of rows [R, D] and of topk_weights [T, K] in float32.

    The first is None unless `want_rows`; the second is None if `rows` is.
    """
    slots = plan.inverse.shape[0]
    bound = plan.order.shape[0]
    dim = dy.shape[1]
    drows = dy.new_empty(bound, dim) if want_rows else None
    dweights = None
    if rows is not None:
        dweights = dy.new_empty(slots // plan.top_k, plan.top_k, dtype=torch.float32)
    kernels = _kernels_for(dy, rows)
    warps = _THREADS // WARP
    kernels.to_tokens_backward(
        (ceil_div(slots, warps) + _TAIL, 1),
        _THREADS,
        dy,
        rows,
        topk_weights,
        plan.inverse,
        _live(plan),
        drows,
        dweights,
        slots,
        dim // kernels.vector,
        bound,
        plan.top_k,
    )
    return drows, dweights


def _kernels_for(*optional_tensors: Tensor | None) -> MoveKernels:
    """Return the kernels that move 16 bytes at a time if all rows are aligned, else 1 element."""
    tensors = [tensor for tensor in optional_tensors if tensor is not None]
    dtype = tensors[0].dtype
    row_bytes = tensors[0].shape[1] * dtype.itemsize
    aligned = row_bytes % _BYTES == 0 and all(t.data_ptr() % _BYTES == 0 for t in tensors)
    vector, single = vectors_of(dtype)
    return move_kernels(dtype, vector if aligned else single)


def _columns(vectors: int) -> tuple[int, int]:
    """Return the threads per block and the blocks per row for rows of `vectors` packs."""
    threads = min(_THREADS, round_up(vectors, WARP))
    return threads, ceil_div(vectors, threads)


def _live(plan: Plan) -> Tensor:
    """Return the number of live rows as a tensor [1]: reading it here would be a host sync."""
    return plan.offsets[-1:]
