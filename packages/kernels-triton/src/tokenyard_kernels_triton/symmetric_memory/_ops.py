"""Dispatch and combine as operators. The gradient of each is the trip of the other.

Selective recompute keeps their results, so nothing is sent again in the backward pass.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tokenyard.operators import operator, refuse_second_derivative
from tokenyard_kernels_triton.symmetric_memory._buffer import Link, link


@operator("tokenyard_triton::dispatch", kept=True)
def dispatch(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, number: int, bound: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Send tokens x [T, D] to the ranks of their experts, by the link of a number.

    Return the rows [n * C, D] and weights [n * C, K] that this rank receives, the ids [n * C, K] of
    its experts (E / n means dropped), the same ids or none if there are more slots than `bound`,
    and status [n + 1] int32: the number of tokens of each rank, and of slots of this rank.
    """
    trips = link(number)
    copies = _copies(x.device.type)
    region = trips.next_region()
    x = _aligned(x)
    copies.publish_tokens(region, x, topk_ids.contiguous(), topk_weights.contiguous())
    trips.barrier()
    rows, weights, ids, bounded_ids, status = copies.pull_tokens(region, x, bound)
    return rows, weights, ids, bounded_ids, status


@dispatch.fake
def _(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, number: int, bound: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sizes = link(number).sizes
    shape = (sizes.received, sizes.top_k)
    ids = topk_ids.new_empty(shape, dtype=torch.int32)
    rows = x.new_empty(sizes.received, sizes.dim)
    status = ids.new_empty(sizes.ranks + 1)
    return rows, topk_weights.new_empty(shape), ids, torch.empty_like(ids), status


@operator("tokenyard_triton::combine", kept=True)
def combine(rows: Tensor, ids: Tensor, topk_ids: Tensor, number: int) -> Tensor:
    """Return the results of this rank's tokens [T, D], each summed over the ranks of its experts.

    `rows` [n * C, D] and `ids` [n * C, K] are those that this rank received, computed.
    """
    y, _ = _to_tokens(link(number), rows, None, ids, topk_ids)
    return y


@combine.fake
def _(rows: Tensor, ids: Tensor, topk_ids: Tensor, number: int) -> Tensor:
    return rows.new_empty(topk_ids.shape[0], rows.shape[1])


def _to_tokens(
    trips: Link, rows: Tensor, dots: Tensor | None, ids: Tensor, topk_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum rows [n * C, D], and dots [n * C, K], of all ranks to their tokens; a trip."""
    copies = _copies(rows.device.type)
    region = trips.next_region()
    rows = _aligned(rows)
    dots = None if dots is None else dots.contiguous()
    copies.publish_rows(region, rows, dots, ids)
    trips.barrier()
    y, token_dots = copies.sum_rows(region, rows, dots, topk_ids.contiguous())
    return y, token_dots


def _save_dispatch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, topk_ids, _, ctx.number, _ = inputs
    _, _, ids, bounded_ids, status = output
    ctx.mark_non_differentiable(ids, bounded_ids, status)
    ctx.save_for_backward(topk_ids, ids)


def _dispatch_backward(
    ctx: Any, drows: Tensor, dweights: Tensor, *unused: Any
) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("symmetric_memory", "all_to_all_tokens")
    topk_ids, ids = ctx.saved_tensors
    dots = dweights if ctx.needs_input_grad[2] else None
    dx, topk_dweights = _to_tokens(link(ctx.number), drows, dots, ids, topk_ids)
    return dx, None, None if dots is None else topk_dweights, None, None


def _save_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ids, _, ctx.number = inputs
    ctx.save_for_backward(ids)


def _combine_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("symmetric_memory", "all_to_all_tokens")
    (ids,) = ctx.saved_tensors
    trips = link(ctx.number)
    copies = _copies(dy.device.type)
    region = trips.next_region()
    dy = _aligned(dy)
    copies.publish_tokens(region, dy)
    trips.barrier()
    return copies.pull_rows(region, dy, ids), None, None, None


dispatch.differentiable(_dispatch_backward, _save_dispatch)
combine.differentiable(_combine_backward, _save_combine)


@functools.cache
def _copies(device_type: str) -> Any:
    """Return the module of copies for a type of device."""
    if device_type == "cuda":
        from tokenyard_kernels_triton.symmetric_memory import _triton_copies

        return _triton_copies
    from tokenyard_kernels_triton.symmetric_memory import _torch_copies

    return _torch_copies


def _aligned(x: Tensor) -> Tensor:
    """Return x, contiguous and aligned to the 16 bytes that a thread reads at once."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
