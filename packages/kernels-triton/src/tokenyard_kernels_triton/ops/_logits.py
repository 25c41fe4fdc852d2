"""Router logits of 16-bit operands on a GPU: one matmul, accumulated and returned in float32.

The incoming gradient is float32. It is split into the sum of two 16-bit numbers, so that both
matmuls of the backward pass run on the tensor cores. In bfloat16 this loses about 2^-16 of the
gradient; rounding it would lose 2^-8. In float16, parts below 6e-8 are lost and numbers above 65504
overflow: use loss scaling, which float16 needs anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenyard.operators import operator, refuse_second_derivative
from tokenyard_kernels_triton._device import on_device_of
from tokenyard_kernels_triton.ops._quantize import split_in_two


@operator("tokenyard_triton::logits", kept=True)
def logits_op(x: Tensor, weight: Tensor) -> Tensor:
    """Return x [T, D] @ weight.T [D, E] in float32."""
    return _matmul_float32(x, weight.t())


@logits_op.fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


@operator("tokenyard_triton::logits_backward")
def logits_backward_op(
    dlogits: Tensor, x: Tensor, weight: Tensor, needs: list[bool]
) -> list[Tensor]:
    """Return the gradients of x and of weight; empty if not needed."""
    with on_device_of(x):
        both = split_in_two(dlogits, x.dtype)  # [T, 2E]
    dx = x.new_empty(0)
    dweight = x.new_empty(0)
    if needs[0]:
        dx = both @ torch.cat((weight, weight))
    if needs[1]:
        dweight = _matmul_float32(both.t(), x).view(2, *weight.shape).sum(0).to(weight.dtype)
    return [dx, dweight]


@logits_backward_op.fake
def _(dlogits: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> list[Tensor]:
    return [t.new_empty(t.shape if need else 0) for t, need in zip((x, weight), needs)]


def _matmul_float32(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right in float32. A CPU has no such matmul for 16-bit operands."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("triton")
    needs = list(ctx.needs_input_grad)
    grads = logits_backward_op(dlogits, *ctx.saved_tensors, needs)
    return tuple(g if need else None for g, need in zip(grads, needs))


logits_op.differentiable(_backward, _save)
