"""The expert layer with adapters as an operator: low-rank matmuls beside those of a kernel set.

The equations are those of ``ops._experts``, with W x + s B (A x) in place of W x. ``kernels`` names
the kernel set of the matmuls with W. The forward pass also saves s A x of both adapters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard.experts import LoraCall, register_lora_op
from tokenyard.interfaces import ExpertWeights
from tokenyard_kernels_triton._device import on_device_of
from tokenyard_kernels_triton.launching import compiling
from tokenyard_kernels_triton.ops._experts_call import is_empty
from tokenyard_kernels_triton.ops._kernel_set import KernelSetName
from tokenyard_kernels_triton.ops._lora_backward import backward, differentiable
from tokenyard_kernels_triton.ops._lora_layer import lora_layer
from tokenyard_kernels_triton.ops._low_rank import add_low_rank
from tokenyard_kernels_triton.ops._moves import to_tokens
from tokenyard_kernels_triton.ops._save import Save, keep, saved_shapes


def _forward(call: LoraCall, save: Save, kernels: KernelSetName) -> tuple[Tensor, ...]:
    """Return y [T, D] and the four tensors of `_saved`."""
    if is_empty(call):
        return torch.zeros_like(call.x), *_saved(call, save, kernels)
    with on_device_of(call.x):
        layer = lora_layer(call, kernels)
        call = layer.call
        row_tiles = layer.row_tiles
        low_up = call.x.new_empty(0)
        low_down = call.x.new_empty(0)
        if call.up is not None:
            low_up = layer.low(call.up, layer.up_input())
        z, a = layer.activated(low_up, keep_z=save != "recompute")
        if call.down is not None:
            low_down = layer.low(call.down, layer.down_input(a))
        _, down, _, down_bias = call.weights
        y_rows = layer.matmuls.times_weight(a, down, down_bias, row_tiles, True, "down")
        del a  # free it before the next allocation
        if call.down is not None:
            add_low_rank(y_rows, low_down, call.down.b, None, row_tiles, transposed=True)
        y = to_tokens(y_rows, call.plan, call.topk_weights)
        return y, *keep(z, row_tiles, save), low_up, low_down


def _saved(call: LoraCall, save: Save, kernels: KernelSetName) -> tuple[Tensor, ...]:
    """Return the saved pre-activation, its scales, and s A x [R, r] of up and of down."""
    rows = call.plan.order.shape[0]
    lows = (
        call.x.new_empty(0) if pair is None else call.x.new_empty(rows, pair.a.shape[1])
        for pair in (call.up, call.down)
    )
    return *saved_shapes(call.x, rows, call.weights.up.shape[1], save), *lows


def compile_lora(call: LoraCall, save: Save, kernels: KernelSetName) -> None:
    """Compile what both passes launch on a frozen base. The call's tensors may hold anything."""
    wanted = set(differentiable(call)) - {*ExpertWeights._fields}
    with compiling():
        y, *saved = _forward(call, save, kernels)
        backward(y, call, saved, wanted, save, kernels)


lora_experts = register_lora_op(
    "tokenyard_triton::lora_experts", _forward, backward, _saved, 4, ["save", "kernels"]
)
