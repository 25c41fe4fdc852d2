"""The expert layer as an operator; `Save` selects what is kept for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenyard.experts import ExpertGradients, ExpertNeeds, ExpertsCall, register_experts_op
from tokenyard.interfaces import GradientSums
from tokenyard_kernels_triton._device import on_device_of
from tokenyard_kernels_triton.launching import compiling
from tokenyard_kernels_triton.ops._alignment import aligned
from tokenyard_kernels_triton.ops._experts_call import (
    aligned_call,
    all_needs,
    is_empty,
    needed,
    sizes_of,
    tensors_of,
    with_tensors,
    zero_gradients,
)
from tokenyard_kernels_triton.ops._gradient import copied_rows, differentiate, sum_rows
from tokenyard_kernels_triton.ops._kernel_set import (
    KernelSet,
    KernelSetName,
    fitting_set,
    kernel_set,
)
from tokenyard_kernels_triton.ops._moves import sum_dots, to_tokens
from tokenyard_kernels_triton.ops._row_tiles import RowTiles
from tokenyard_kernels_triton.ops._save import Save, gradient_space, keep, restore, saved_shapes
from tokenyard_kernels_triton.replay import replayed

_Totals = tuple[Tensor | None, Tensor | None]  # of up and down


def _forward(
    call: ExpertsCall, save: Save, kernels: KernelSetName
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [T, D], what is saved of the pre-activation, and its scales."""
    if is_empty(call):
        return torch.zeros_like(call.x), *_saved(call, save, kernels)
    call = aligned_call(call)
    kernels = fitting_set(kernels, call.plan, call.x.dtype)

    def launches(*tensors: Any) -> tuple[Tensor, ...]:
        return _launch_forward(with_tensors(call, tensors), save, kernels)

    with on_device_of(call.x):
        key = ("experts", save, kernels, *sizes_of(call))
        y, saved, scales = replayed(key, launches, tensors_of(call))
    return y, saved, scales


def _launch_forward(
    call: ExpertsCall, save: Save, kernels: KernelSetName
) -> tuple[Tensor, Tensor, Tensor]:
    x, plan, topk_weights, (up, down, up_bias, down_bias), activation = call
    row_tiles = RowTiles(plan.offsets, plan.order.shape[0])
    matmuls = kernel_set(kernels)
    keep_z = save != "recompute"
    rows = matmuls.rows_of(x, plan, down.shape[2])
    z, a = matmuls.up_and_activate(rows, up, up_bias, row_tiles, activation, keep_z)
    del rows  # free each operand before the next allocation
    y_rows = matmuls.times_weight(a, down, down_bias, row_tiles, True, "down")
    del a
    y = to_tokens(y_rows, plan, topk_weights)
    return y, *keep(z, row_tiles, save)


def _saved(call: ExpertsCall, save: Save, kernels: KernelSetName) -> tuple[Tensor, Tensor]:
    rows = call.plan.order.shape[0]
    return saved_shapes(call.x, rows, call.weights.up.shape[1], save)


def _backward(
    dy: Tensor,
    call: ExpertsCall,
    saved: list[Tensor],
    needs: ExpertNeeds,
    sums: GradientSums | None,
    save: Save,
    kernels: KernelSetName,
) -> ExpertGradients:
    if is_empty(call):
        return zero_gradients(call, needs)
    call = aligned_call(call)
    kernels = fitting_set(kernels, call.plan, call.x.dtype)
    names = needed(needs, sums)
    kind = type(saved)  # Donated or not

    def launches(
        dy: Tensor,
        saved: Tensor,
        scales: Tensor,
        up_sum: Tensor | None,
        down_sum: Tensor | None,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        inputs = with_tensors(call, tensors)
        totals = (up_sum, down_sum)
        both = kind((saved, scales))
        gradients = _launch_backward(dy, inputs, both, needs, totals, save, kernels)
        return tuple(gradients[name] for name in names)

    with on_device_of(call.x):
        key = ("experts backward", save, kernels, needs, kind, *sizes_of(call))
        totals = sums or (None, None)
        gradients = replayed(key, launches, (aligned(dy), *saved, *totals, *tensors_of(call)))
    return ExpertGradients(**dict(zip(names, gradients)))


def _launch_backward(
    dy: Tensor,
    call: ExpertsCall,
    saved: list[Tensor],
    needs: ExpertNeeds,
    totals: _Totals,
    save: Save,
    kernels: KernelSetName,
) -> dict[str, Tensor]:
    row_tiles = RowTiles(call.plan.offsets, call.plan.order.shape[0])
    matmuls = kernel_set(kernels)
    up, down = totals
    dz, gradients = _through_down(dy, call, saved, needs, down, save, row_tiles, matmuls)
    if dz is not None:
        gradients |= _through_up(dz, call, needs, up, row_tiles, matmuls)
    return gradients


def _through_down(
    dy: Tensor,
    call: ExpertsCall,
    saved: list[Tensor],
    needs: ExpertNeeds,
    total: Tensor | None,
    save: Save,
    row_tiles: RowTiles,
    matmuls: KernelSet[Any],
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Return dz [R, 2F or F], None if not needed, and gradients; add that of down to a total."""
    _, plan, topk_weights, (_, down, _, down_bias), activation = call
    gradients: dict[str, Tensor] = {}

    # Rows of dy: copied if a bias reads them, else gathered by the matmuls if that is faster.
    copied, bias = copied_rows(dy, plan, down_bias, needs.down_bias, needs.topk_weights)
    drows = matmuls.rows_of(dy, plan, down.shape[2]) if copied is None else copied
    if needs.down_bias and copied is not None:
        gradients["down_bias"] = sum_rows(copied, row_tiles, plan.order, topk_weights)
    if not any(needs[:5]):
        return None, gradients
    z = _pre_activation(call, saved, save, row_tiles, matmuls)
    dz = gradient_space(z, saved, save)
    weigh = (plan.order, topk_weights, row_tiles, activation)
    if bias is None:
        weighted, dots = matmuls.differentiate_down(drows, down, z, dz, *weigh)
    else:
        da = matmuls.times_weight(drows, down, None, row_tiles, False, "activation_gradient")
        weighted, dots = differentiate(da, z, dz, bias, *weigh)
        del da  # free it before the next allocation
    if needs.topk_weights and topk_weights is not None:
        gradients["topk_weights"] = sum_dots(dots, plan)
    if needs.down:
        gradients["down"] = matmuls.weight_gradient(
            drows, weighted, row_tiles, "down_gradient", total=total
        )
    return dz, gradients


def _through_up(
    dz: Tensor,
    call: ExpertsCall,
    needs: ExpertNeeds,
    total: Tensor | None,
    row_tiles: RowTiles,
    matmuls: KernelSet[Any],
) -> dict[str, Tensor]:
    """Return the gradients of the up projection, added to a total if there is one, and of x."""
    x, plan, _, (up, down, _, _), _ = call
    gradients: dict[str, Tensor] = {}
    if needs.x:  # first: its rows are large, and the gradient of up is not there yet
        dx_rows = matmuls.times_weight(dz, up, None, row_tiles, False, "input_gradient")
        gradients["x"] = to_tokens(dx_rows, plan, None)
        del dx_rows  # free them before the next allocation
    if needs.up:
        rows = matmuls.rows_of(x, plan, down.shape[2])
        gradients["up"] = matmuls.weight_gradient(dz, rows, row_tiles, "up_gradient", total=total)
    if needs.up_bias:
        gradients["up_bias"] = sum_rows(dz, row_tiles, plan.order, None)
    return gradients


def _pre_activation(
    call: ExpertsCall,
    saved: list[Tensor],
    save: Save,
    row_tiles: RowTiles,
    matmuls: KernelSet[Any],
) -> Tensor:
    """Return z [R, 2F or F] as saved, dequantized, or recomputed."""
    z = restore(saved, call.x, row_tiles, save)
    if z is None:
        up, down, up_bias, _ = call.weights
        rows = matmuls.rows_of(call.x, call.plan, down.shape[2])
        z, _ = matmuls.up_and_activate(rows, up, up_bias, row_tiles, call.activation, keep_a=False)
    return z


def compile_experts(
    call: ExpertsCall, save: Save, kernels: KernelSetName, sums: GradientSums | None = None
) -> None:
    """Compile what a forward and a backward pass launch, and one that adds if sums are given.

    The tensors may hold anything.
    """
    needs = all_needs(call)
    with compiling():
        y, *saved = _forward(call, save, kernels)
        _backward(y, call, saved, needs, None, save, kernels)
        if sums is not None:
            _backward(y, call, saved, needs, sums, save, kernels)


experts = register_experts_op(
    "tokenyard_triton::experts",
    _forward,
    _backward,
    _saved,
    saves=2,
    options={"save": str, "kernels": str},
    adds=True,
)
