"""Launching the moves between tokens and rows; every function allocates what it returns."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from tokenyard.interfaces import Plan
from tokenyard_kernels_cuda.ops._sizes import WARP, ceil_div, round_up
from tokenyard_kernels_cuda.toolchain import Array, Int, Kernel, Parameters, Source

ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "float"}
"""What kernels call the dtypes that they move."""

_THREADS = 256  # of a block, at most
_TAIL = 64  # blocks that clear the tail; mostly there is none
_BYTES = 16  # that a thread moves at a time


class Moves(NamedTuple):
    """The kernels for rows of one dtype, so many elements of which are moved at a time."""

    vector: int
    to_rows: Kernel
    to_tokens: Kernel
    to_tokens_backward: Kernel


@cache
def moves(dtype: torch.dtype, vector: int) -> Moves:
    """Return the kernels that move `vector` elements of a dtype at a time."""
    source = Source("moves.cu", (("ELEMENT", ELEMENTS[dtype]), ("VECTOR", str(vector))))
    rows, rows_or_not = Array(dtype), Array(dtype, optional=True)
    ints, floats_or_not, number = Array(torch.int32), Array(torch.float32, optional=True), Int()
    where: Parameters = {"inverse": ints, "live": ints}
    sizes: Parameters = {"vectors": number, "bound": number, "top_k": number}
    given: Parameters = {"dy": rows, "rows": rows_or_not, "weights": floats_or_not}
    gradients: Parameters = {"drows": rows_or_not, "dweights": floats_or_not, "slots": number}
    return Moves(
        vector,
        Kernel(source, "to_rows", x=rows, **where, rows=rows, tokens=number, **sizes),
        Kernel(source, "to_tokens", rows=rows, weights=floats_or_not, **where, y=rows, **sizes),
        Kernel(source, "to_tokens_backward", **given, **where, **gradients, **sizes),
    )


def vectors_of(dtype: torch.dtype) -> tuple[int, int]:
    """Return how many elements of a dtype are moved at a time: those of 16 bytes, or one where rows do not lie so."""
    return _BYTES // dtype.itemsize, 1


def to_rows(x: Tensor, plan: Plan) -> Tensor:
    """Copy tokens x [T, D] to rows [R, D]; the tail is zero."""
    tokens, dim = x.shape
    rows = x.new_empty(plan.order.shape[0], dim)
    how = _moves_of(x)
    vectors = dim // how.vector
    threads, parts = _columns(vectors)
    grid = (tokens + _TAIL, parts)
    how.to_rows(
        grid, threads, x, plan.inverse, _live(plan), rows, tokens, vectors, len(rows), plan.top_k
    )
    return rows


def to_tokens(rows: Tensor, plan: Plan, topk_weights: Tensor | None) -> Tensor:
    """Sum each token's rows [R, D], weighted if weights [T, K] are given, in float32, to [T, D]."""
    bound, dim = rows.shape
    tokens = plan.inverse.shape[0] // plan.top_k
    y = rows.new_empty(tokens, dim)
    how = _moves_of(rows)
    vectors = dim // how.vector
    threads, parts = _columns(vectors)
    where = (plan.inverse, _live(plan), y)
    how.to_tokens((tokens, parts), threads, rows, topk_weights, *where, vectors, bound, plan.top_k)
    return y


def to_tokens_backward(
    dy: Tensor, rows: Tensor | None, topk_weights: Tensor | None, plan: Plan, want_rows: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of rows [R, D], if wanted, and, if rows are given, of topk_weights [T, K] in float32."""
    slots, bound, dim = plan.inverse.shape[0], plan.order.shape[0], dy.shape[1]
    drows = dy.new_empty(bound, dim) if want_rows else None
    dweights = (
        None if rows is None else dy.new_empty(slots // plan.top_k, plan.top_k, dtype=torch.float32)
    )
    how = _moves_of(dy, rows)
    warps = _THREADS // WARP
    grid = (ceil_div(slots, warps) + _TAIL, 1)
    where = (plan.inverse, _live(plan), drows, dweights)
    sizes = (slots, dim // how.vector, bound, plan.top_k)
    how.to_tokens_backward(grid, _THREADS, dy, rows, topk_weights, *where, *sizes)
    return drows, dweights


def _moves_of(*given: Tensor | None) -> Moves:
    """Return the kernels that move 16 bytes at a time, if all tensors lie so, or else single elements."""
    tensors = [tensor for tensor in given if tensor is not None]
    dtype, width = tensors[0].dtype, tensors[0].shape[1] * tensors[0].element_size()
    aligned = width % _BYTES == 0 and all(tensor.data_ptr() % _BYTES == 0 for tensor in tensors)
    return moves(dtype, vectors_of(dtype)[0 if aligned else 1])


def _columns(vectors: int) -> tuple[int, int]:
    """Return how many threads a block has, and how many blocks a row is shared by."""
    threads = min(_THREADS, round_up(vectors, WARP))
    return threads, ceil_div(vectors, threads)


def _live(plan: Plan) -> Tensor:
    return plan.offsets[-1:]
