"""The expert layer as one custom op and its gradient as another; between them stands what `Save` says."""

from __future__ import annotations

import functools
import importlib
from typing import Any, Literal

import torch
from torch import Tensor

from tokenyard.interfaces import Plan
from tokenyard_kernels_triton._device import on_device_of
from tokenyard_kernels_triton.ops._gradient import differentiate, sum_rows
from tokenyard_kernels_triton.ops._layout import Layout
from tokenyard_kernels_triton.ops._moves import sum_dots, to_rows, to_tokens
from tokenyard_kernels_triton.ops._narrow import narrow, narrow_shapes, widen

Save = Literal["pre_activation", "fp8", "recompute"]
"""What a forward pass keeps of the pre-activation for its backward pass."""

Products = Literal["portable", "hopper"]
"""Who computes the products: the module ``ops._portable`` or ``ops._hopper``."""


@functools.cache
def _products(name: str) -> Any:
    return importlib.import_module(f"tokenyard_kernels_triton.ops._{name}")


@torch.library.custom_op("tokenyard_triton::experts", mutates_args=())
def experts_op(
    x: Tensor,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    topk_weights: Tensor | None,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    top_k: int,
    activation: str,
    save: str,
    kernels: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [T, D], what is saved of the pre-activation, and its scales."""
    plan = Plan(order, inverse, offsets, top_k)
    if order.shape[0] == 0 or x.shape[0] == 0:
        return torch.zeros_like(x), *_nothing_saved(x, up, 0, save)
    x, up, down = (_aligned(t) for t in (x, up, down))
    topk_weights, up_bias, down_bias = (_contiguous(t) for t in (topk_weights, up_bias, down_bias))
    with on_device_of(x):
        layout, products = Layout(offsets, order.shape[0]), _products(kernels)
        rows = products.rows_of(x, plan, down.shape[2])
        z, a = products.up_and_activate(rows, up, up_bias, layout, activation, save != "recompute")
        del rows
        rows = products.times_weight(a, down, down_bias, layout, True, "down")
        del a
        y = to_tokens(rows, plan, topk_weights)
        return y, *(narrow(z, layout.live) if save == "fp8" else (z, x.new_empty(0)))


@experts_op.register_fake
def _(
    x: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor | None, up: Tensor, *rest: Any
) -> Any:
    return torch.empty_like(x, memory_format=torch.contiguous_format), *_nothing_saved(x, up, order.shape[0], rest[-2])


def _nothing_saved(x: Tensor, up: Tensor, rows: int, save: str) -> tuple[Tensor, Tensor]:
    """Return what is saved, undefined."""
    width = up.shape[1]
    if save == "fp8":
        return narrow_shapes(x, rows, width)
    return x.new_empty(0 if save == "recompute" else rows, width), x.new_empty(0)


@torch.library.custom_op("tokenyard_triton::experts_backward", mutates_args=())
def experts_backward_op(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    scales: Tensor,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    topk_weights: Tensor | None,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    top_k: int,
    activation: str,
    save: str,
    kernels: str,
    needs: list[bool],
) -> list[Tensor]:
    """Return the gradients of x, topk_weights, up, down, up_bias and down_bias; an empty one where none is needed."""
    likes = _likes(x, topk_weights, up, down)
    if order.shape[0] == 0 or x.shape[0] == 0:
        return [t.new_zeros(t.shape if n else 0) for t, n in zip(likes, needs)]
    plan = Plan(order, inverse, offsets, top_k)
    dy, x, up, down = (_aligned(t) for t in (dy, x, up, down))
    topk_weights, up_bias, down_bias = (_contiguous(t) for t in (topk_weights, up_bias, down_bias))
    grads: list[Tensor | None] = [None] * 6
    need_x, need_weights, need_up, need_down, need_up_bias, need_down_bias = needs
    with on_device_of(x):
        layout, products, ffn_dim = Layout(offsets, order.shape[0]), _products(kernels), down.shape[2]
        bias = down_bias if need_weights else None
        copied = need_down_bias or bias is not None
        drows = to_rows(dy, plan) if copied else products.rows_of(dy, plan, ffn_dim)
        if need_down_bias:
            grads[5] = sum_rows(drows, layout, order, topk_weights)
        if any(needs[:5]):
            if save == "recompute":
                rows = products.rows_of(x, plan, ffn_dim)
                z, _ = products.up_and_activate(rows, up, up_bias, layout, activation, keep_a=False)
                del rows
            if save == "fp8":
                z = widen(z, scales, layout.live, x.dtype)
            da = products.times_weight(drows, down, None, layout, False, "activation_gradient")
            rows = drows if copied else None
            dz, weighted, dots = differentiate(da, rows, z, bias, order, topk_weights, layout, activation)
            del z, da
            if need_weights and topk_weights is not None:
                grads[1] = sum_dots(dots, plan)
            if need_down:
                grads[3] = products.weight_gradient(drows, weighted, layout, "down_gradient")
            del rows, drows, weighted, dots
            if need_up:
                grads[2] = products.weight_gradient(dz, products.rows_of(x, plan, ffn_dim), layout, "up_gradient")
            if need_up_bias:
                grads[4] = sum_rows(dz, layout, order, None)
            if need_x:
                grads[0] = to_tokens(products.times_weight(dz, up, None, layout, False, "input_gradient"), plan, None)
    return [dy.new_empty(0) if grad is None else grad for grad in grads]


@experts_backward_op.register_fake
def _(dy: Tensor, x: Tensor, z: Tensor, scales: Tensor, *rest: Any) -> list[Tensor]:
    _, _, _, topk_weights, up, down, _, _, _, _, _, _, needs = rest
    likes = _likes(x, topk_weights, up, down)
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if n else t.new_empty(0)
        for t, n in zip(likes, needs)
    ]


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _aligned(tensor: Tensor) -> Tensor:
    """Return a tensor that is contiguous and begins at a multiple of 16 bytes, as the copy engine needs it."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _likes(x: Tensor, topk_weights: Tensor | None, up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    weights = x if topk_weights is None else topk_weights
    return (x, weights, up, down, up.new_empty(up.shape[:2]), down.new_empty(down.shape[:2]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, order, inverse, offsets, topk_weights, up, down, up_bias, down_bias, top_k, activation, save, kernels = inputs
    _, z, scales = output
    ctx.mark_non_differentiable(z, scales)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, z, scales, order, inverse, offsets, topk_weights, up, down, up_bias, down_bias)
    ctx.how = (top_k, activation, save, kernels)


def _backward(ctx: Any, dy: Tensor, dz: Tensor | None, dscales: Tensor | None) -> tuple[Tensor | None, ...]:
    need = ctx.needs_input_grad
    needs = [need[i] for i in (0, 4, 5, 6, 7, 8)]
    grads = experts_backward_op(dy, *ctx.saved_tensors, *ctx.how, needs)
    dx, dweights, dup, ddown, dup_bias, ddown_bias = (g if n else None for g, n in zip(grads, needs))
    return dx, None, None, None, dweights, dup, ddown, dup_bias, ddown_bias, None, None, None, None


experts_op.register_autograd(_backward, setup_context=_setup_context)
