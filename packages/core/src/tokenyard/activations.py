"""Activations of an expert, a = act(z).

A gated activation takes z = [gate | up] and returns act(gate) * up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F


def relu_squared(x: Tensor) -> Tensor:
    """Return relu(x)^2 (So et al. 2021, Primer, arXiv 2109.08668)."""
    return F.relu(x).square()


_gelu_tanh = partial(F.gelu, approximate="tanh")

POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": F.silu,
    "relu": F.relu,
    "relu_squared": relu_squared,
}
"""Ungated activations: name -> function."""

GATED: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "reglu": F.relu,
}
"""Gated activations: name -> function of the gate half (Shazeer 2020, arXiv 2002.05202)."""

ACTIVATIONS: tuple[str, ...] = (*GATED, *POINTWISE)
"""Names of all activations that an expert kernel must support."""


def is_gated(activation: str) -> bool:
    """Return True if the up projection has 2F rows, gate rows first."""
    return activation in GATED


def up_rows(activation: str, ffn_dim: int) -> int:
    """Return the number of rows of one expert's up projection: 2F if gated, else F."""
    return 2 * ffn_dim if is_gated(activation) else ffn_dim


def activate(z: Tensor, activation: str) -> Tensor:
    """Return the activation a [..., F] of the pre-activation z [..., 2F] or [..., F]."""
    if not is_gated(activation):
        return POINTWISE[activation](z)
    gate, up = z.chunk(2, dim=-1)
    return GATED[activation](gate) * up


def activate_with_pullback(z: Tensor, activation: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return ``activate(z)`` and a function that maps its gradient da [..., F] to dz.

    The function does not use autograd.
    """
    if not is_gated(activation):
        return POINTWISE[activation](z), lambda da: _pointwise_backward(da, z, activation)
    gate, up = z.chunk(2, dim=-1)
    gate_act = GATED[activation](gate)

    def pullback(da: Tensor) -> Tensor:
        dz = torch.empty_like(z)
        dgate, dup = dz.chunk(2, dim=-1)  # views, so both halves are written into dz
        _GATE_BACKWARD[activation](da * up, gate, grad_input=dgate)
        torch.mul(da, gate_act, out=dup)
        return dz

    return gate_act * up, pullback


_GATE_BACKWARD: dict[str, Callable[..., Tensor]] = {
    "swiglu": torch.ops.aten.silu_backward.grad_input,
    "geglu": torch.ops.aten.gelu_backward.grad_input,
    "reglu": partial(torch.ops.aten.threshold_backward.grad_input, threshold=0),
}
"""Gated activations: name -> gate gradient, with an out= form that writes half of dz in place."""


def _pointwise_backward(da: Tensor, z: Tensor, activation: str) -> Tensor:
    aten = torch.ops.aten
    match activation:
        case "silu":
            return aten.silu_backward(da, z)
        case "gelu":
            return aten.gelu_backward(da, z)
        case "gelu_tanh":
            return aten.gelu_backward(da, z, approximate="tanh")
        case "relu":
            return aten.threshold_backward(da, z, 0)
        case _:
            return da * 2 * F.relu(z)
