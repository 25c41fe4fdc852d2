"""The reference implementation of experts, in plain differentiable torch code.

In float64 it is the oracle. In a lower dtype its error sets the tolerance. It shares no code with
any backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tokenyard.activations import ACTIVATIONS, swiglu_options
from tokenyard.interfaces import ExpertWeights


def _gelu(z: Tensor) -> Tensor:
    return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def _gelu_tanh(z: Tensor) -> Tensor:
    return z * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def _silu(z: Tensor) -> Tensor:
    return z / (1 + torch.exp(-z))


def _relu(z: Tensor) -> Tensor:
    return torch.where(z > 0, z, torch.zeros_like(z))


def _gated(gate: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def act(z: Tensor) -> Tensor:
        half = z.shape[1] // 2
        return gate(z[:, :half]) * z[:, half:]

    return act


def _clamped_swiglu(z: Tensor, activation: str) -> Tensor:
    alpha, limit, offset = swiglu_options(activation)
    half = z.shape[1] // 2
    gate = torch.where(z[:, :half] > limit, limit, z[:, :half])
    up = z[:, half:]
    up = torch.where(up > limit, limit, torch.where(up < -limit, -limit, up))
    return (up + offset) * gate / (1 + torch.exp(-alpha * gate))


_ACT: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": _gated(_silu),
    "geglu": _gated(_gelu),
    "reglu": _gated(_relu),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "relu": _relu,
    "relu_squared": lambda z: _relu(z) ** 2,
}


def _activate(z: Tensor, activation: str) -> Tensor:
    return _ACT[activation](z) if activation in ACTIVATIONS else _clamped_swiglu(z, activation)


def experts(
    x: Tensor, ids: Tensor, topk_weights: Tensor | None, weights: ExpertWeights, activation: str
) -> Tensor:
    """Return y [T, D]: the sum over a token's kept slots of weight * down(act(up(x))).

    The sum is in float32 at least.
    """
    y = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for e in range(weights.up.shape[0]):
        token, k = (ids == e).nonzero(as_tuple=True)  # [n], [n]: the slots of expert e
        z = x[token] @ weights.up[e].T  # [n, 2F or F]
        z = z if weights.up_bias is None else z + weights.up_bias[e]
        row = _activate(z, activation) @ weights.down[e].T  # [n, D]
        row = row if weights.down_bias is None else row + weights.down_bias[e]
        gate = 1 if topk_weights is None else topk_weights[token, k].unsqueeze(1)  # [n, 1]
        y = y.index_add(0, token, gate * row.to(y.dtype))
    return y.to(x.dtype)
