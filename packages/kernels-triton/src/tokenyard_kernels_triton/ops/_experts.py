"""The expert layer as an operator; `Save` says what its forward pass keeps for the backward pass."""

from __future__ import annotations

import functools
import importlib
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from tokenyard.experts import ExpertGradients, ExpertNeeds, ExpertsCall, register_experts_op
from tokenyard.interfaces import ExpertWeights, Plan
from tokenyard_kernels_triton._device import on_device_of
from tokenyard_kernels_triton.launching import compiling
from tokenyard_kernels_triton.ops._gradient import differentiate, sum_rows
from tokenyard_kernels_triton.ops._moves import sum_dots, to_rows, to_tokens
from tokenyard_kernels_triton.ops._quantize import narrow, narrow_shapes, widen
from tokenyard_kernels_triton.ops._row_tiles import RowTiles

Save = Literal["pre_activation", "fp8", "recompute"]
"""What a forward pass keeps of the pre-activation for its backward pass."""

Products = Literal["portable", "gluon"]
"""The module that launches the matmuls: ``ops._portable`` or ``ops._gluon``."""


class Rows(Protocol):
    """Rows [R, D] sorted by expert: a tensor, or tokens whose rows each matmul gathers itself."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(R, D)."""
        ...


class Matmuls(Protocol):
    """What ``ops._portable`` and ``ops._gluon`` both define; every function allocates what it returns."""

    def rows_of(self, tokens: Tensor, plan: Plan, ffn_dim: int) -> Rows:
        """Return the rows of tokens [T, D] as an operand."""
        ...

    def up_and_activate(
        self,
        x: Rows,
        up: Tensor,
        bias: Tensor | None,
        layout: RowTiles,
        activation: str,
        keep_z: bool = True,
        keep_a: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Return z [R, 2F or F] and a [R, F] of rows x [R, D]; one that is not kept is empty."""
        ...

    def times_weight(
        self,
        rows: Rows,
        weight: Tensor,
        bias: Tensor | None,
        layout: RowTiles,
        transposed: bool,
        product: str,
    ) -> Tensor:
        """Return rows [R, M] times each expert's weight [E, M, N], or [E, N, M] if transposed, plus bias [E, N]."""
        ...

    def weight_gradient(self, left: Rows, right: Rows, layout: RowTiles, product: str) -> Tensor:
        """Return [E, M, N]: over each expert's rows, left [R, M] transposed times right [R, N]."""
        ...


@functools.cache
def _matmuls(name: str) -> Matmuls:
    return cast(Matmuls, importlib.import_module(f"tokenyard_kernels_triton.ops._{name}"))


def _forward(call: ExpertsCall, save: str, kernels: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [T, D], what is saved of the pre-activation, and its scales."""
    if _is_empty(call):
        return torch.zeros_like(call.x), *_saved(call, save, kernels)
    x, plan, topk_weights, (up, down, up_bias, down_bias), activation = _aligned_call(call)
    with on_device_of(x):
        layout = RowTiles(plan.offsets, plan.order.shape[0])
        matmuls = _matmuls(kernels)
        rows = matmuls.rows_of(x, plan, down.shape[2])
        z, a = matmuls.up_and_activate(rows, up, up_bias, layout, activation, save != "recompute")
        del rows
        rows = matmuls.times_weight(a, down, down_bias, layout, True, "down")
        del a
        y = to_tokens(rows, plan, topk_weights)
        if save == "fp8":
            return y, *narrow(z, layout.live)
        return y, z, x.new_empty(0)


def _saved(call: ExpertsCall, save: str, kernels: str) -> tuple[Tensor, Tensor]:
    x, rows, width = call.x, call.plan.order.shape[0], call.weights.up.shape[1]
    if save == "fp8":
        return narrow_shapes(x, rows, width)
    return x.new_empty(0 if save == "recompute" else rows, width), x.new_empty(0)


def _backward(
    dy: Tensor, call: ExpertsCall, saved: list[Tensor], needs: ExpertNeeds, save: str, kernels: str
) -> ExpertGradients:
    if _is_empty(call):
        return _zero_gradients(call, needs)
    call = _aligned_call(call)
    with on_device_of(call.x):
        return _gradients(_aligned(dy), call, saved, needs, save, _matmuls(kernels))


def _gradients(
    dy: Tensor,
    call: ExpertsCall,
    saved: list[Tensor],
    needs: ExpertNeeds,
    save: str,
    matmuls: Matmuls,
) -> ExpertGradients:
    x, plan, topk_weights, (up, down, _, down_bias), activation = call
    layout = RowTiles(plan.offsets, plan.order.shape[0])
    ffn_dim = down.shape[2]
    gradients: dict[str, Tensor] = {}

    # Rows of dy: copied if a bias reads them, else gathered by the matmuls if that is faster.
    bias = down_bias if needs.topk_weights else None
    copied = to_rows(dy, plan) if needs.down_bias or bias is not None else None
    drows = matmuls.rows_of(dy, plan, ffn_dim) if copied is None else copied
    if needs.down_bias and copied is not None:
        gradients["down_bias"] = sum_rows(copied, layout, plan.order, topk_weights)
    if not any(needs[:5]):
        return ExpertGradients(**gradients)

    # Through the down projection and the activation.
    z = _pre_activation(call, layout, saved, save, matmuls)
    da = matmuls.times_weight(drows, down, None, layout, False, "activation_gradient")
    dz, weighted, dots = differentiate(
        da, copied, z, bias, plan.order, topk_weights, layout, activation
    )
    del z, da
    if needs.topk_weights and topk_weights is not None:
        gradients["topk_weights"] = sum_dots(dots, plan)
    if needs.down:
        gradients["down"] = matmuls.weight_gradient(drows, weighted, layout, "down_gradient")
    del copied, drows, weighted, dots

    # Through the up projection.
    if needs.up:
        rows = matmuls.rows_of(x, plan, ffn_dim)
        gradients["up"] = matmuls.weight_gradient(dz, rows, layout, "up_gradient")
        del rows
    if needs.up_bias:
        gradients["up_bias"] = sum_rows(dz, layout, plan.order, None)
    if needs.x:
        dx_rows = matmuls.times_weight(dz, up, None, layout, False, "input_gradient")
        gradients["x"] = to_tokens(dx_rows, plan, None)
    return ExpertGradients(**gradients)


def _pre_activation(
    call: ExpertsCall, layout: RowTiles, saved: list[Tensor], save: str, matmuls: Matmuls
) -> Tensor:
    """Return z [R, 2F or F] as saved, widened, or computed again."""
    z, scales = saved
    if save == "fp8":
        return widen(z, scales, layout.live, call.x.dtype)
    if save == "recompute":
        rows = matmuls.rows_of(call.x, call.plan, call.weights.down.shape[2])
        up, up_bias = call.weights.up, call.weights.up_bias
        z, _ = matmuls.up_and_activate(rows, up, up_bias, layout, call.activation, keep_a=False)
    return z


def compile_experts(call: ExpertsCall, save: str, kernels: str) -> None:
    """Compile what a forward and a backward pass launch, for a call whose tensors may hold anything."""
    with compiling():
        y, *saved = _forward(call, save, kernels)
        needs = ExpertNeeds(
            True,
            call.topk_weights is not None,
            True,
            True,
            *(b is not None for b in call.weights[2:]),
        )
        _backward(y, call, saved, needs, save, kernels)


def _is_empty(call: ExpertsCall) -> bool:
    return call.plan.order.shape[0] == 0 or call.x.shape[0] == 0


def _zero_gradients(call: ExpertsCall, needs: ExpertNeeds) -> ExpertGradients:
    up, down = call.weights.up, call.weights.down
    topk_weights = call.x if call.topk_weights is None else call.topk_weights
    likes = (call.x, topk_weights, up, down, up[..., 0], down[..., 0])
    return ExpertGradients(
        *(like.new_zeros(like.shape) if need else None for like, need in zip(likes, needs))
    )


def _aligned_call(call: ExpertsCall) -> ExpertsCall:
    """Return the call with tensors as the kernels read them: contiguous, and x, up and down aligned."""
    up, down, up_bias, down_bias = call.weights
    weights = ExpertWeights(
        _aligned(up), _aligned(down), _contiguous(up_bias), _contiguous(down_bias)
    )
    return call._replace(
        x=_aligned(call.x), topk_weights=_contiguous(call.topk_weights), weights=weights
    )


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _aligned(tensor: Tensor) -> Tensor:
    """Return a tensor that is contiguous and begins at a multiple of 16 bytes, as the copy engine needs it."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


experts = register_experts_op(
    "tokenyard_triton::experts",
    _forward,
    _backward,
    _saved,
    saves=2,
    options={"save": str, "kernels": str},
)
