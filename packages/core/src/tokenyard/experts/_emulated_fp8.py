"""The expert layer in FP8, emulated in plain torch: what FP8 kernels must compute.

Both matmuls of the forward pass and both gradients of data multiply numbers in e4m3
(``tokenyard.fp8``) and add in float32. Gradients of weights multiply numbers in the layer's dtype.
The names of the equations are those of ``tokenyard.experts.TorchExperts``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenyard.activations import activate, activate_with_pullback
from tokenyard.errors import ConfigError
from tokenyard.experts._grouped_matmuls import (
    add_bias,
    row_experts,
    rows_outer,
    rows_sum,
    rows_times,
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
    dtype. "recompute" reads the second. Raises ConfigError for widths that are not multiples of
    128.
    """

    def __init__(self, workload: Workload, permutation: Permutation, save: Saved = "fp8"):
        if (reason := why_no_fp8(workload.dim, workload.ffn_dim)) is not None:
            raise ConfigError(reason)
        self.activation = workload.activation
        self.save_fp8 = save == "fp8"

    def __call__(
        self, x: Tensor, plan: Plan, topk_weights: Tensor | None, weights: ExpertWeights
    ) -> Tensor:
        """Return y [T, D] for unsorted tokens x [T, D]."""
        return _experts(x, plan, topk_weights, weights, self.activation, save_fp8=self.save_fp8)


def _forward(call: ExpertsCall, save_fp8: bool) -> tuple[Tensor, Tensor, Tensor]:
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


def _saved(call: ExpertsCall, save_fp8: bool) -> tuple[Tensor, Tensor]:
    rows, width = call.plan.order.shape[0], call.weights.up.shape[1]
    if not save_fp8:
        return call.x.new_empty(rows, width), call.x.new_empty(0, dtype=torch.float32)
    scales = call.x.new_empty(rows, width // BLOCK, dtype=torch.float32)
    return call.x.new_empty(rows, width, dtype=torch.uint8), scales


def _backward(
    dy: Tensor, call: ExpertsCall, saved: list[Tensor], needs: ExpertNeeds, save_fp8: bool
) -> ExpertGradients:
    x, plan, topk_weights, (up, down, _, down_bias), activation = call
    offsets = plan.offsets
    gradients: dict[str, Tensor] = {}
    values, scales = saved
    z = dequantize(Quantized(values.view(DTYPE), scales)) if save_fp8 else values.float()
    a, pullback = activate_with_pullback(z, activation)  # [R, F]
    drows = to_rows(dy.contiguous(), plan)  # [R, D], not multiplied by topk_weights
    row_weights = None if topk_weights is None else slots_to_rows(topk_weights.float(), plan)

    # Through the down projection and the activation. Nothing but matmuls is rounded to FP8.
    da = rows_times(_rows_in_fp8(drows), _weights_in_fp8(down), offsets)  # [R, F] not weighted
    da = da.to(x.dtype).float()
    dz = pullback(da if row_weights is None else da * row_weights)  # [R, 2F or F]
    if needs.topk_weights and topk_weights is not None:
        dots = _row_dots(da, a, drows, down_bias, offsets)
        gradients["topk_weights"] = rows_to_slots(dots, plan).squeeze(-1).to(topk_weights.dtype)
    if needs.x:
        dx = rows_times(_rows_in_fp8(dz), _weights_in_fp8(up), offsets)
        gradients["x"] = to_tokens(dx.to(x.dtype), plan, None)

    # Gradients of parameters.
    weighted = (a if row_weights is None else a * row_weights).to(x.dtype)
    dz = dz.to(x.dtype)
    if needs.down:
        gradients["down"] = _outer(drows, weighted, offsets)
    if needs.down_bias:
        weighted_dy = drows if row_weights is None else (drows * row_weights).to(x.dtype)
        gradients["down_bias"] = rows_sum(weighted_dy, offsets)
    if needs.up:
        gradients["up"] = _outer(dz, to_rows(x, plan), offsets)
    if needs.up_bias:
        gradients["up_bias"] = rows_sum(dz, offsets)
    return ExpertGradients(**gradients)


_experts = register_experts_op(
    "tokenyard::experts_in_emulated_fp8",
    _forward,
    _backward,
    _saved,
    saves=2,
    options={"save_fp8": bool},
)


def _rows_in_fp8(rows: Tensor) -> Tensor:
    return dequantize(quantize_rows(rows))


def _weights_in_fp8(weights: Tensor) -> Tensor:
    return dequantize(quantize_weights(weights))


def _outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    return rows_outer(left.float(), right.float(), offsets).to(left.dtype)


def _row_dots(
    da: Tensor, a: Tensor, drows: Tensor, down_bias: Tensor | None, offsets: Tensor
) -> Tensor:
    """Return [R, 1]: <dA', A>, plus <dY, bias> if there is a down bias."""
    dots = (da * a).sum(1, keepdim=True)
    if down_bias is not None:
        bias = down_bias[row_experts(drows, offsets)].float()
        dots += (drows.float() * bias).sum(1, keepdim=True)
    return dots
