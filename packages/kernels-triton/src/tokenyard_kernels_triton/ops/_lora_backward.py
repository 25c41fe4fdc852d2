"""The gradients of an expert layer with adapters."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard.experts import LoraCall
from tokenyard_kernels_triton._device import on_device_of
from tokenyard_kernels_triton.ops._alignment import aligned
from tokenyard_kernels_triton.ops._experts_call import is_empty
from tokenyard_kernels_triton.ops._gradient import copied_rows, differentiate, sum_rows
from tokenyard_kernels_triton.ops._kernel_set import KernelSetName
from tokenyard_kernels_triton.ops._lora_layer import LoraLayer, lora_layer
from tokenyard_kernels_triton.ops._low_rank import (
    WideOperand,
    add_low_rank,
    low_rank_gradient,
    tokens_as_rows,
)
from tokenyard_kernels_triton.ops._moves import sum_dots, to_tokens
from tokenyard_kernels_triton.ops._save import Save, gradient_space, restore


def backward(
    dy: Tensor,
    call: LoraCall,
    saved: list[Tensor],
    wanted: set[str],
    save: Save,
    kernels: KernelSetName,
) -> dict[str, Tensor]:
    """Return the gradients of the tensors that `wanted` names."""
    if is_empty(call):
        return {name: torch.zeros_like(like) for name, like in differentiable(call).items()}
    with on_device_of(call.x):
        layer = lora_layer(call, kernels)
        *pre_activation, low_up, low_down = saved
        z = restore(pre_activation, call.x, layer.row_tiles, save)
        if z is None:
            z, _ = layer.activated(low_up, keep_a=False)
        dz = gradient_space(z, saved, save)
        gradients = _through_down(aligned(dy), z, dz, low_down, layer, wanted)
        return gradients | _through_up(dz, low_up, layer, wanted)


def _through_down(
    dy: Tensor, z: Tensor, dz: Tensor, low: Tensor, layer: LoraLayer, wanted: set[str]
) -> dict[str, Tensor]:
    """Write dz [R, 2F or F]; return the gradients of the down projection and of topk_weights."""
    _, plan, topk_weights, (_, down, _, down_bias), _, pair, _, mask, activation = layer.call
    matmuls, row_tiles = layer.matmuls, layer.row_tiles
    gradients: dict[str, Tensor] = {}

    # Rows of dy: copied if a bias reads them, else gathered by the matmuls if that is faster.
    copied, bias = copied_rows(dy, plan, down_bias, "down_bias" in wanted, "topk_weights" in wanted)
    drows = layer.rows_of(dy) if copied is None else copied
    if "down_bias" in wanted and copied is not None:
        gradients["down_bias"] = sum_rows(copied, row_tiles, plan.order, topk_weights)

    # Through the down projection and the activation.
    da = matmuls.times_weight(drows, down, None, row_tiles, False, "activation_gradient")
    if pair is not None:
        dlow = layer.low_gradient(pair, tokens_as_rows(dy, plan))
        add_low_rank(da, dlow, pair.a, mask, row_tiles, transposed=False)
    weighted, dots = differentiate(da, z, dz, bias, plan.order, topk_weights, row_tiles, activation)
    del da  # free it before the next allocation
    if "topk_weights" in wanted:
        gradients["topk_weights"] = sum_dots(dots, plan)
    if "down" in wanted:
        gradients["down"] = matmuls.weight_gradient(drows, weighted, row_tiles, "down_gradient")
    if pair is not None and "down_a" in wanted:
        wide = layer.down_input(weighted)
        gradients["down_a"] = low_rank_gradient(wide, dlow, None, row_tiles, transposed=False)
    if pair is not None and "down_b" in wanted:
        wide = tokens_as_rows(dy, plan)
        gradients["down_b"] = low_rank_gradient(wide, low, topk_weights, row_tiles, transposed=True)
    return gradients


def _through_up(dz: Tensor, low: Tensor, layer: LoraLayer, wanted: set[str]) -> dict[str, Tensor]:
    """Return the gradients of the up projection, of x, and of x after dropout."""
    x, plan, _, (up, *_), pair, _, dropped, *_ = layer.call
    matmuls, row_tiles = layer.matmuls, layer.row_tiles
    gradients: dict[str, Tensor] = {}
    if pair is not None:
        wide = WideOperand(dz, plan.order)
        dlow = layer.low_gradient(pair, wide)
        if "up_a" in wanted:
            gradients["up_a"] = low_rank_gradient(
                layer.up_input(), dlow, None, row_tiles, transposed=False
            )
        if "up_b" in wanted:
            gradients["up_b"] = low_rank_gradient(wide, low, None, row_tiles, transposed=True)
        if "dropped" in wanted:
            rows = x.new_empty(row_tiles.rows, x.shape[1])
            add_low_rank(rows, dlow, pair.a, None, row_tiles, transposed=False, add=False)
            gradients["dropped"] = to_tokens(rows, plan, None)
    if "up" in wanted:
        rows = layer.rows_of(x)
        gradients["up"] = matmuls.weight_gradient(dz, rows, row_tiles, "up_gradient")
    if "up_bias" in wanted:
        gradients["up_bias"] = sum_rows(dz, row_tiles, plan.order, None)
    if "x" in wanted:
        rows = matmuls.times_weight(dz, up, None, row_tiles, False, "input_gradient")
        if pair is not None and dropped is None:
            add_low_rank(rows, dlow, pair.a, None, row_tiles, transposed=False)
        gradients["x"] = to_tokens(rows, plan, None)
    return gradients


def differentiable(call: LoraCall) -> dict[str, Tensor]:
    """Return the differentiable tensors of a call by name."""
    tensors = {
        "x": call.x,
        "topk_weights": call.topk_weights,
        **call.weights._asdict(),
        "dropped": call.dropped,
    }
    for name, pair in (("up", call.up), ("down", call.down)):
        if pair is not None:
            tensors |= {f"{name}_a": pair.a, f"{name}_b": pair.b}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}
