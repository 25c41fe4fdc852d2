"""The expert layer in FP8, emulated in plain torch: what FP8 kernels must compute.

Both matmuls of the forward pass and both gradients of data multiply numbers in e4m3
(``tokenyard.fp8``) and add in float32. Gradients of weights multiply numbers in the layer's dtype,
or in e4m3 too: then 128 rows of an expert are a block of the operands.
The names of the equations are those of ``tokenyard.experts.TorchExperts``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenyard.activations import activate, activate_with_pullback
from tokenyard.errors import ConfigError
from tokenyard.experts._grouped_matmuls import (
    add_bias,
    row_experts,
    rows_outer,
    rows_sum,
    rows_times,
    segments,
)
from tokenyard.experts._op import ExpertGradients, ExpertNeeds, ExpertsCall, register_experts_op
from tokenyard.fp8 import (
    BLOCK,
    DTYPE,
    Quantized,
    dequantize,
    quantize_rows,
    quantize_weights,
    why_no_fp8,
)
from tokenyard.interfaces import ExpertWeights, Permutation, Plan
from tokenyard.permutations._moves import rows_to_slots, slots_to_rows, to_rows, to_tokens
from tokenyard.workload import Workload

Saved = Literal["fp8", "pre_activation", "recompute"]


class EmulatedFp8Experts:
    """Computes experts with the rounding errors of FP8 kernels, slowly; once differentiable.

    `save` is what the backward pass reads: the pre-activation in FP8, or rounded to the layer's
    dtype. "recompute" reads the second. `weight_gradients` "fp8" multiplies the operands of weight
    gradients in FP8. Raises ConfigError for widths that are not multiples of 128.
    """

    def __init__(
        self,
        workload: Workload,
        permutation: Permutation,
        save: Saved = "fp8",
        weight_gradients: Literal["fp8"] | None = None,
    ):
        if (reason := why_no_fp8(workload.dim, workload.ffn_dim)) is not None:
            raise ConfigError(reason)
        self.activation = workload.activation
        self.options = {"save_fp8": save == "fp8", "weights_fp8": weight_gradients == "fp8"}

    def __call__(
        self, x: Tensor, plan: Plan, topk_weights: Tensor | None, weights: ExpertWeights
    ) -> Tensor:
        """Return y [T, D] for unsorted tokens x [T, D]."""
        return _experts(x, plan, topk_weights, weights, self.activation, **self.options)


def _forward(call: ExpertsCall, save_fp8: bool, weights_fp8: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [T, D], the saved pre-activation [R, 2F or F], and its scales or an empty tensor."""
    x, plan, topk_weights, (up, down, up_bias, down_bias), activation = call
    z = rows_times(to_rows(_rows_in_fp8(x), plan), _weights_in_fp8(up).mT, plan.offsets)
    z = add_bias(z, up_bias, plan.offsets)  # [R, 2F or F] float32
    a = _rows_in_fp8(activate(z, activation))  # [R, F]
    rows = rows_times(a, _weights_in_fp8(down).mT, plan.offsets)  # [R, D]
    rows = add_bias(rows, down_bias, plan.offsets).to(x.dtype)
    y = to_tokens(rows, plan, topk_weights)
    if not save_fp8:
        return y, z.to(x.dtype, copy=True), z.new_empty(0)
    values, scales = quantize_rows(z)
    return y, values.view(torch.uint8), scales  # tools of torch cannot add up float8


def _saved(call: ExpertsCall, save_fp8: bool, weights_fp8: bool) -> tuple[Tensor, Tensor]:
    rows, width = call.plan.order.shape[0], call.weights.up.shape[1]
    if not save_fp8:
        return call.x.new_empty(rows, width), call.x.new_empty(0, dtype=torch.float32)
    scales = call.x.new_empty(rows, width // BLOCK, dtype=torch.float32)
    return call.x.new_empty(rows, width, dtype=torch.uint8), scales


def _backward(
    dy: Tensor,
    call: ExpertsCall,
    saved: list[Tensor],
    needs: ExpertNeeds,
    save_fp8: bool,
    weights_fp8: bool,
) -> ExpertGradients:
    x, plan, topk_weights, (up, down, _, down_bias), activation = call
    offsets = plan.offsets
    gradients: dict[str, Tensor] = {}
    values, scales = saved
    z = dequantize(Quantized(values.view(DTYPE), scales)) if save_fp8 else values.float()
    a, pullback = activate_with_pullback(z, activation)  # [R, F]
    drows = to_rows(dy.contiguous(), plan)  # [R, D], not multiplied by topk_weights
    row_weights = None if topk_weights is None else slots_to_rows(topk_weights.float(), plan)

    # Through the down projection and the activation. Only operands of matmuls are rounded to FP8.
    da = rows_times(_rows_in_fp8(drows), _weights_in_fp8(down), offsets)  # [R, F] not weighted
    da = da.to(x.dtype).float()
    dz = pullback(_weighted(da, row_weights))  # [R, 2F or F]
    if needs.topk_weights and topk_weights is not None:
        dots = _row_dots(da, a, drows, down_bias, offsets)
        gradients["topk_weights"] = rows_to_slots(dots, plan).squeeze(-1).to(topk_weights.dtype)
    if needs.x:
        dx = rows_times(_rows_in_fp8(dz), _weights_in_fp8(up), offsets)
        gradients["x"] = to_tokens(dx.to(x.dtype), plan, None)

    # Gradients of parameters.
    outer = _outer_in_fp8 if weights_fp8 else _outer
    dz = dz.to(x.dtype)
    if needs.down:
        gradients["down"] = outer(drows, _weighted(a, row_weights).to(x.dtype), offsets)
    if needs.down_bias:
        gradients["down_bias"] = rows_sum(_weighted(drows, row_weights), offsets)
    if needs.up:
        gradients["up"] = outer(dz, to_rows(x, plan), offsets)
    if needs.up_bias:
        gradients["up_bias"] = rows_sum(dz, offsets)
    return ExpertGradients(**gradients)


def _weighted(rows: Tensor, row_weights: Tensor | None) -> Tensor:
    return rows if row_weights is None else (rows * row_weights).to(rows.dtype)


_experts = register_experts_op(
    "tokenyard::experts_in_emulated_fp8",
    _forward,
    _backward,
    _saved,
    saves=2,
    options={"save_fp8": bool, "weights_fp8": bool},
)


def _rows_in_fp8(rows: Tensor) -> Tensor:
    return dequantize(quantize_rows(rows))


def _weights_in_fp8(weights: Tensor) -> Tensor:
    return dequantize(quantize_weights(weights))


def _outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    return rows_outer(left.float(), right.float(), offsets).to(left.dtype)


def _outer_in_fp8(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """Return what `_outer` returns; the gradient `left` has a scale for 128 rows of a column.

    `right` has a scale for 128 x 128 numbers. Zeros fill an expert's last block.
    """
    out = left.new_zeros(offsets.shape[0] - 1, left.shape[1], right.shape[1])
    for e, start, end in segments(offsets):
        padding = (0, 0, 0, -(end - start) % BLOCK)
        gradient, operand = (F.pad(side[start:end], padding).mT for side in (left, right))
        out[e] = _rows_in_fp8(gradient) @ _weights_in_fp8(operand[None])[0].mT
    return out


def _row_dots(
    da: Tensor, a: Tensor, drows: Tensor, down_bias: Tensor | None, offsets: Tensor
) -> Tensor:
    """Return [R, 1]: <dA', A>, plus <dY, bias> if there is a down bias."""
    dots = (da * a).sum(1, keepdim=True)
    if down_bias is not None:
        bias = down_bias[row_experts(drows, offsets)].float()
        dots += (drows.float() * bias).sum(1, keepdim=True)
    return dots
