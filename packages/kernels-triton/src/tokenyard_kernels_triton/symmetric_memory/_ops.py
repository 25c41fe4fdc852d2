"""Dispatch and combine as operators. The gradient of each is the trip of the other.

Selective recompute keeps their results, so nothing is sent again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenyard.operators import operator, refuse_second_derivative
from tokenyard_kernels_triton.symmetric_memory._buffer import SymmetricBuffer, buffer_of
from tokenyard_kernels_triton.symmetric_memory._region import Sizes


@operator("tokenyard_triton::dispatch", kept=True)
def dispatch(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    group: str,
    ranks: int,
    capacity: int,
    held: int,
    bound: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Send tokens x [T, D] to the ranks of their experts.

    Return the rows [n * C, D] and weights [n * C, K] that this rank receives, the ids [n * C, K] of
    its experts (E / n means dropped), the same ids or none if there are more slots than `bound`,
    and status [n + 1] int32: the number of tokens of each rank, and of slots of this rank.
    """
    sizes = _sizes(x, topk_ids, (ranks, capacity, held), topk_weights.dtype)
    buffer = buffer_of(group, x.device)
    copies = _copies(x)
    region = buffer.next_region(sizes)
    x = _aligned(x)
    copies.publish_tokens(region, x, topk_ids.contiguous(), topk_weights.contiguous())
    buffer.barrier()
    rows, weights, ids, bounded_ids, status = copies.pull_tokens(region, x, bound)
    return rows, weights, ids, bounded_ids, status


@dispatch.fake
def _(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    group: str,
    ranks: int,
    capacity: int,
    held: int,
    bound: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    received = ranks * capacity
    shape = (received, topk_ids.shape[1])
    ids = topk_ids.new_empty(shape, dtype=torch.int32)
    return (
        x.new_empty(received, x.shape[1]),
        topk_weights.new_empty(shape),
        ids,
        torch.empty_like(ids),
        ids.new_empty(ranks + 1),
    )


@operator("tokenyard_triton::combine", kept=True)
def combine(
    rows: Tensor, ids: Tensor, topk_ids: Tensor, group: str, ranks: int, capacity: int, held: int
) -> Tensor:
    """Return the results of this rank's tokens [T, D], each summed over the ranks of its experts.

    `rows` [n * C, D] and `ids` [n * C, K] are those that this rank received, computed.
    """
    sizes = _sizes(rows, topk_ids, (ranks, capacity, held), torch.float32)
    y, _ = _to_tokens(buffer_of(group, rows.device), sizes, rows, None, ids, topk_ids)
    return y


@combine.fake
def _(
    rows: Tensor, ids: Tensor, topk_ids: Tensor, group: str, ranks: int, capacity: int, held: int
) -> Tensor:
    return rows.new_empty(topk_ids.shape[0], rows.shape[1])


def _to_tokens(
    buffer: SymmetricBuffer,
    sizes: Sizes,
    rows: Tensor,
    dots: Tensor | None,
    ids: Tensor,
    topk_ids: Tensor,
) -> tuple[Tensor, Tensor]:
    """Sum rows [n * C, D], and dots [n * C, K], of all ranks to their tokens; a trip."""
    copies = _copies(rows)
    region = buffer.next_region(sizes)
    rows = _aligned(rows)
    dots = None if dots is None else dots.contiguous()
    copies.publish_rows(region, rows, dots, ids)
    buffer.barrier()
    y, token_dots = copies.sum_rows(region, rows, dots, topk_ids.contiguous())
    return y, token_dots


def _save_dispatch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, topk_ids, topk_weights, ctx.group, *ctx.numbers, _ = inputs
    _, _, ids, bounded_ids, status = output
    ctx.weights_dtype = topk_weights.dtype
    ctx.mark_non_differentiable(ids, bounded_ids, status)
    ctx.save_for_backward(topk_ids, ids)


def _dispatch_backward(
    ctx: Any, drows: Tensor, dweights: Tensor, *unused: Any
) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("symmetric_memory", "all_to_all_tokens")
    topk_ids, ids = ctx.saved_tensors
    sizes = _sizes(drows, topk_ids, ctx.numbers, ctx.weights_dtype)
    dots = dweights if ctx.needs_input_grad[2] else None
    buffer = buffer_of(ctx.group, drows.device)
    dx, topk_dweights = _to_tokens(buffer, sizes, drows, dots, ids, topk_ids)
    gradients = (dx, None, None if dots is None else topk_dweights)
    return *gradients, None, None, None, None, None


def _save_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ids, topk_ids, ctx.group, *ctx.numbers = inputs
    ctx.save_for_backward(ids, topk_ids)


def _combine_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("symmetric_memory", "all_to_all_tokens")
    ids, topk_ids = ctx.saved_tensors
    sizes = _sizes(dy, topk_ids, ctx.numbers, torch.float32)
    buffer = buffer_of(ctx.group, dy.device)
    copies = _copies(dy)
    region = buffer.next_region(sizes)
    dy = _aligned(dy)
    copies.publish_tokens(region, dy)
    buffer.barrier()
    return copies.pull_rows(region, dy, ids), None, None, None, None, None, None


dispatch.differentiable(_dispatch_backward, _save_dispatch)
combine.differentiable(_combine_backward, _save_combine)


def _sizes(
    x: Tensor, topk_ids: Tensor, numbers: Sequence[int], weights_dtype: torch.dtype
) -> Sizes:
    ranks, capacity, held = numbers
    return Sizes(ranks, capacity, x.shape[1], topk_ids.shape[1], held, x.dtype, weights_dtype)


def _copies(x: Tensor) -> Any:
    """Return the module of copies for a device."""
    if x.is_cuda:
        from tokenyard_kernels_triton.symmetric_memory import _triton_copies

        return _triton_copies
    from tokenyard_kernels_triton.symmetric_memory import _torch_copies

    return _torch_copies


def _aligned(x: Tensor) -> Tensor:
    """Return x, contiguous and aligned to the 16 bytes that a thread reads at once."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
