"""The expert layer in FP8 as an operator: both data passes in float8, and weight gradients too.

Without `weights_fp8`, weight gradients are computed in 16 bits.

``tokenyard.experts.EmulatedFp8Experts`` says what it computes. `Save` selects what is kept of the
pre-activation: in float8 by the up matmul itself, in 16 bits, or nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenyard.experts import ExpertGradients, ExpertNeeds, ExpertsCall, register_experts_op
from tokenyard.fp8 import DTYPE
from tokenyard_kernels_triton._device import on_device_of
from tokenyard_kernels_triton.gluon_tiling import Matmul
from tokenyard_kernels_triton.launching import compiling
from tokenyard_kernels_triton.ops import _gluon, _gluon_fp8
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
from tokenyard_kernels_triton.ops._fp8_weights import Copies, kept_weights
from tokenyard_kernels_triton.ops._gradient import (
    copied_rows,
    differentiate_and_quantize,
    sum_rows,
)
from tokenyard_kernels_triton.ops._moves import sum_dots, to_tokens
from tokenyard_kernels_triton.ops._quantize import (
    QuantizedWeights,
    quantize_tokens,
    quantize_weights,
)
from tokenyard_kernels_triton.ops._row_tiles import RowTiles
from tokenyard_kernels_triton.ops._save import Save, saved_shapes
from tokenyard_kernels_triton.ops._token_rows import Rows, TokenRows
from tokenyard_kernels_triton.ops._transpose import transpose_rows
from tokenyard_kernels_triton.replay import replayed

_KEPT = len(QuantizedWeights._fields)


@dataclass
class _Layer:
    """A call, its tile lists, and its weights in float8 if they are kept."""

    call: ExpertsCall
    row_tiles: RowTiles
    up: QuantizedWeights
    down: QuantizedWeights
    save: Save
    weights_fp8: bool = False

    @property
    def ffn_dim(self) -> int:
        """F."""
        return self.call.weights.down.shape[2]

    def token_rows(self, tokens: Tensor) -> Rows:
        """Return the rows of tokens [T, D] in 16 bits as an operand of a weight gradient."""
        plan = self.call.plan
        if self.weights_fp8:
            return TokenRows(tokens, plan.order, plan.top_k)
        return _gluon.rows_of(tokens, plan, self.ffn_dim)

    def weight_gradient(self, gradient: Rows, operand: Rows, matmul: Matmul) -> Tensor:
        """Return [E, M, N]: gradient [R, M] transposed @ operand [R, N] over each expert's rows."""
        if not self.weights_fp8:
            return _gluon.weight_gradient(gradient, operand, self.row_tiles, matmul)
        return _gluon_fp8.weight_gradient(
            transpose_rows(gradient, self.row_tiles, square=False),
            transpose_rows(operand, self.row_tiles, square=True),
            self.row_tiles,
            self.call.x.dtype,
        )


def _layer(call: ExpertsCall, kept: Sequence[Any], save: Save, backward: bool) -> _Layer:
    """Return a layer with the weights in float8 that were kept, or else quantized for one pass."""
    row_tiles = RowTiles(call.plan.offsets, call.plan.order.shape[0])
    up, down, *_ = call.weights
    if kept:
        both = (QuantizedWeights(*kept[:_KEPT]), QuantizedWeights(*kept[_KEPT:]))
    else:
        passes = {"forward": not backward or save == "recompute", "backward": backward}
        both = (
            quantize_weights(up, **passes),
            quantize_weights(down, forward=not backward, backward=backward),
        )
    return _Layer(call, row_tiles, *both, save)


def _kept(call: ExpertsCall, copies: Copies) -> tuple[Tensor | None, ...]:
    """Return the tensors of both weights in float8 if they are kept, else nothing."""
    if copies == "none":
        return ()
    up, down = (kept_weights(weights, copies == "captured") for weights in call.weights[:2])
    return () if up is None or down is None else (*up, *down)


def _forward(
    call: ExpertsCall, save: Save, copies: Copies, weights_fp8: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [T, D], what is saved of the pre-activation, and its scales."""
    if is_empty(call):
        return torch.zeros_like(call.x), *_saved(call, save, copies, weights_fp8)
    call = aligned_call(call)

    def launches(*tensors: Any) -> tuple[Tensor, ...]:
        inputs = with_tensors(call, tensors[: len(own)])
        return _launch_forward(_layer(inputs, tensors[len(own) :], save, backward=False))

    with on_device_of(call.x):
        own = tensors_of(call)
        key = ("experts in fp8", save, *sizes_of(call))
        y, saved, scales = replayed(key, launches, (*own, *_kept(call, copies)))
    return y, saved, scales


def _launch_forward(layer: _Layer) -> tuple[Tensor, Tensor, Tensor]:
    x, plan, topk_weights, (_, _, up_bias, down_bias), activation = layer.call
    tiles = layer.row_tiles
    rows = _gluon_fp8.rows_of(quantize_tokens(x), plan, layer.ffn_dim)
    saved, a = _gluon_fp8.up_and_activate(
        rows, layer.up, up_bias, tiles, activation, layer.save, x.dtype
    )
    del rows  # free each operand before the next allocation
    a_rows = _gluon_fp8.sorted_rows(a)
    y_rows = _gluon_fp8.times_weight(a_rows, layer.down, down_bias, tiles, True, x.dtype)
    del a, a_rows
    return to_tokens(y_rows, plan, topk_weights), *saved


def _saved(
    call: ExpertsCall, save: Save, copies: Copies, weights_fp8: bool
) -> tuple[Tensor, Tensor]:
    rows = call.plan.order.shape[0]
    return saved_shapes(call.x, rows, call.weights.up.shape[1], save)


def _backward(
    dy: Tensor,
    call: ExpertsCall,
    saved: list[Tensor],
    needs: ExpertNeeds,
    save: Save,
    copies: Copies,
    weights_fp8: bool,
) -> ExpertGradients:
    if is_empty(call):
        return zero_gradients(call, needs)
    call = aligned_call(call)

    def launches(dy: Tensor, saved: Tensor, scales: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        inputs = with_tensors(call, tensors[: len(own)])
        layer = _layer(inputs, tensors[len(own) :], save, backward=True)
        layer.weights_fp8 = weights_fp8
        gradients = _launch_backward(dy, layer, (saved, scales), needs)
        return tuple(gradients[name] for name in needed(needs))

    with on_device_of(call.x):
        own = tensors_of(call)
        key = ("experts in fp8 backward", save, weights_fp8, needs, *sizes_of(call))
        tensors = (aligned(dy), *saved, *own, *_kept(call, copies))
        gradients = replayed(key, launches, tensors)
    return ExpertGradients(**dict(zip(needed(needs), gradients)))


def _launch_backward(
    dy: Tensor, layer: _Layer, saved: tuple[Tensor, Tensor], needs: ExpertNeeds
) -> dict[str, Tensor]:
    _, plan, topk_weights, (_, _, _, down_bias), activation = layer.call
    tiles = layer.row_tiles
    gradients: dict[str, Tensor] = {}

    # Rows of dy in 16 bits: copied if a bias reads them, else as the weight gradient takes them.
    copied, bias = copied_rows(dy, plan, down_bias, needs.down_bias, needs.topk_weights)
    if needs.down_bias and copied is not None:
        gradients["down_bias"] = sum_rows(copied, tiles, plan.order, topk_weights)
    if not any(needs[:5]):
        return gradients

    # Through the down projection and the activation.
    drows = _gluon_fp8.rows_of(quantize_tokens(dy), plan, layer.ffn_dim)
    da = _gluon_fp8.times_weight(drows, layer.down, None, tiles, False, dy.dtype)
    del drows  # free each operand before the next allocation
    z = _pre_activation(layer, saved)
    dz, quantized, weighted, dots = differentiate_and_quantize(
        da, z, bias, plan.order, topk_weights, tiles, activation
    )
    del z, da
    if needs.topk_weights and topk_weights is not None:
        gradients["topk_weights"] = sum_dots(dots, plan)
    if needs.down:
        rows = layer.token_rows(dy) if copied is None else copied
        gradients["down"] = layer.weight_gradient(rows, weighted, "down_gradient")
        del rows
    del weighted
    return gradients | _through_up(dz, _gluon_fp8.sorted_rows(quantized), layer, needs)


def _through_up(
    dz: Tensor, quantized: _gluon_fp8.QuantizedRows, layer: _Layer, needs: ExpertNeeds
) -> dict[str, Tensor]:
    """Return the gradients of the up projection and of x."""
    x, plan, *_ = layer.call
    tiles = layer.row_tiles
    gradients: dict[str, Tensor] = {}
    if needs.up:
        rows = layer.token_rows(x)
        gradients["up"] = layer.weight_gradient(dz, rows, "up_gradient")
        del rows  # free them before the next allocation
    if needs.up_bias:
        gradients["up_bias"] = sum_rows(dz, tiles, plan.order, None)
    if needs.x:
        dx_rows = _gluon_fp8.times_weight(quantized, layer.up, None, tiles, False, x.dtype)
        gradients["x"] = to_tokens(dx_rows, plan, None)
    return gradients


def _pre_activation(layer: _Layer, saved: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return z [R, 2F or F] in 16 bits and None, or in float8 and its scales."""
    z, scales = saved
    if layer.save == "fp8":
        return z.view(DTYPE), scales
    if layer.save == "pre_activation":
        return z, None
    x, plan, _, (_, _, up_bias, _), activation = layer.call
    rows = _gluon_fp8.rows_of(quantize_tokens(x), plan, layer.ffn_dim)
    (z, _), _ = _gluon_fp8.up_and_activate(
        rows,
        layer.up,
        up_bias,
        layer.row_tiles,
        activation,
        "pre_activation",
        x.dtype,
        keep_a=False,
    )
    return z, None


def compile_fp8_experts(call: ExpertsCall, save: Save, weights_fp8: bool) -> None:
    """Compile what a forward and a backward pass launch. The call's tensors may hold anything."""
    needs = all_needs(call)
    with compiling():
        for weights in call.weights[:2]:
            quantize_weights(weights, forward=True, backward=True)
        y, *saved = _forward(call, save, "none", weights_fp8)
        _backward(y, call, saved, needs, save, "none", weights_fp8)


fp8_experts = register_experts_op(
    "tokenyard_triton::fp8_experts",
    _forward,
    _backward,
    _saved,
    saves=2,
    options={"save": str, "copies": str, "weights_fp8": bool},
)
