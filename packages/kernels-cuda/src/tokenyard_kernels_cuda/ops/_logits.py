"""Router logits of narrow operands: one GEMM that accumulates and returns float32.

The gradient of the logits is float32. For few tokens, one launch multiplies it in float32. For
others, the backward pass splits it into the sum of two narrow
numbers, so that both of its GEMMs run on tensor cores. In bfloat16 the split loses about 2^-16 of
the gradient; rounding alone would lose 2^-8. In float16 numbers below 6e-8 are lost and numbers
above 65504 overflow, so use a loss scaler, which float16 needs anyway.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from tokenyard.operators import operator, refuse_second_derivative
from tokenyard_kernels_cuda.ops._moves import ELEMENTS
from tokenyard_kernels_cuda.ops._sizes import WARP, ceil_div
from tokenyard_kernels_cuda.toolchain import Array, Int, Kernel, Source

_THREADS = 256
_FEW = 64  # tokens, up to which a kernel of ours takes less time than a GEMM and its launch
_FEW_THREADS = 128  # of a block of that kernel
_FEW_TOKENS = 8  # of such a block, as in logits.cu
_SPREAD = 16  # tokens, up to which a block has one expert
FEW_EXPERTS = (1, 8)
"""The experts of a block of few tokens: up to 16 tokens, and beyond."""

_FEW_IN_BACKWARD = 512  # tokens, up to which one launch computes both gradients
_FEW_BACKWARD_THREADS = 256  # of a block of that launch, as in logits_backward.cu
_TILE = (32, 64)  # rows and columns of such a block
_DEPTH = 32  # of a step of its main loop

NARROW = (torch.bfloat16, torch.float16)
"""The dtypes of operands for which these operators replace core's logits."""


@cache
def split_kernel(dtype: torch.dtype) -> Kernel:
    """Return the kernel that splits float32 into the sum of two narrow numbers."""
    source = Source("split.cu", (("ELEMENT", ELEMENTS[dtype]),))
    return Kernel(
        source,
        "split_in_two",
        wide=Array(torch.float32),
        both=Array(dtype),
        rows=Int(),
        width=Int(),
    )


@cache
def few_kernel(dtype: torch.dtype, block_experts: int) -> Kernel:
    """Return the kernel that computes the logits of few tokens, and so many experts a block."""
    macros = (("ELEMENT", ELEMENTS[dtype]), ("EXPERTS", str(block_experts)))
    source = Source("logits.cu", macros)
    return Kernel(
        source,
        "logits_of_few",
        x=Array(dtype),
        weight=Array(dtype),
        logits=Array(torch.float32),
        tokens=Int(),
        experts=Int(),
        vectors=Int(),
    )


@cache
def few_backward_kernel(dtype: torch.dtype) -> Kernel:
    """Return the kernel that computes both gradients of few tokens."""
    source = Source("logits_backward.cu", (("ELEMENT", ELEMENTS[dtype]),))
    return Kernel(
        source,
        "logits_backward_of_few",
        dlogits=Array(torch.float32),
        x=Array(dtype),
        weight=Array(dtype),
        dx=Array(dtype, optional=True),
        dweight=Array(dtype, optional=True),
        tokens=Int(),
        experts=Int(),
        vectors=Int(),
    )


def logits_kernels(dtype: torch.dtype) -> list[Kernel]:
    """List the kernels for operands of a dtype."""
    few = [few_kernel(dtype, experts) for experts in FEW_EXPERTS]
    return [split_kernel(dtype), *few, few_backward_kernel(dtype)]


@operator("tokenyard_cuda::logits", kept=True)
def logits_op(x: Tensor, weight: Tensor) -> Tensor:
    """Return x [T, D] @ weight.T [D, E] in float32."""
    if 0 < x.shape[0] <= _FEW and _has_packs(x) and _has_packs(weight):
        return _logits_of_few(x, weight)
    return _float32_matmul(x, weight.t())


@logits_op.fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


@operator("tokenyard_cuda::logits_backward")
def logits_backward_op(
    dlogits: Tensor, x: Tensor, weight: Tensor, needs: list[bool]
) -> list[Tensor]:
    """Return the gradients of x and weight from dlogits [T, E]; an empty one if not needed."""
    if 0 < x.shape[0] <= _FEW_IN_BACKWARD and _has_packs(x) and _has_packs(weight):
        return _backward_of_few(dlogits.contiguous(), x, weight, needs)
    both = _split(dlogits.contiguous(), x.dtype)  # [T, 2E]
    dx = x.new_empty(0)
    dweight = x.new_empty(0)
    if needs[0]:
        dx = both @ torch.cat((weight, weight))
    if needs[1]:
        halves = _float32_matmul(both.t(), x).view(2, *weight.shape)
        dweight = torch.add(*halves, out=torch.empty_like(weight))  # one launch rounds, too
    return [dx, dweight]


@logits_backward_op.fake
def _(dlogits: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> list[Tensor]:
    return [t.new_empty(t.shape if need else 0) for t, need in zip((x, weight), needs)]


def _has_packs(matrix: Tensor) -> bool:
    """Return whether the rows of a matrix are whole packs of 16 bytes."""
    aligned = matrix.data_ptr() % 16 == 0 and matrix.shape[1] % 8 == 0
    return aligned and matrix.is_contiguous()


def _logits_of_few(x: Tensor, weight: Tensor) -> Tensor:
    tokens, dim = x.shape
    experts = weight.shape[0]
    logits = x.new_empty(tokens, experts, dtype=torch.float32)
    block_experts = FEW_EXPERTS[tokens > _SPREAD]
    few_kernel(x.dtype, block_experts)(
        (ceil_div(experts, block_experts), ceil_div(tokens, _FEW_TOKENS)),
        _FEW_THREADS,
        x,
        weight,
        logits,
        tokens,
        experts,
        dim // 8,
        shared=4 * block_experts * _FEW_TOKENS * _FEW_THREADS // WARP,
    )
    return logits


def _backward_of_few(dlogits: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> list[Tensor]:
    tokens, dim = x.shape
    experts = weight.shape[0]
    dx = torch.empty_like(x) if needs[0] else None
    dweight = torch.empty_like(weight) if needs[1] else None
    rows, columns = _TILE
    of_weight = ceil_div(experts, rows) if needs[1] else 0
    of_x = ceil_div(tokens, rows) if needs[0] else 0
    few_backward_kernel(x.dtype)(
        (ceil_div(dim, columns), of_weight + of_x),
        _FEW_BACKWARD_THREADS,
        dlogits,
        x,
        weight,
        dx,
        dweight,
        tokens,
        experts,
        dim // 8,
        shared=4 * _DEPTH * (rows + columns),
    )
    return [x.new_empty(0) if gradient is None else gradient for gradient in (dx, dweight)]


def _split(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [rows, 2 * width]: each row of `wide` rounded to dtype, then its rounding errors."""
    rows, width = wide.shape
    both = wide.new_empty(rows, 2 * width, dtype=dtype)
    if rows:
        blocks = ceil_div(rows * width, _THREADS)
        split_kernel(dtype)((blocks, 1), _THREADS, wide, both, rows, width)
    return both


def _float32_matmul(left: Tensor, right: Tensor) -> Tensor:
    """Multiply narrow matrices and return float32."""
    # The tests emulate the kernels on a CPU, where torch.mm has no out_dtype.
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("cuda")
    needs = list(ctx.needs_input_grad)
    grads = logits_backward_op(dlogits, *ctx.saved_tensors, needs)
    return tuple(g if need else None for g, need in zip(grads, needs))


logits_op.differentiable(_backward, _save)
