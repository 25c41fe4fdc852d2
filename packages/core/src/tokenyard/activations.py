"""Activations of an expert, a = act(z).

A gated activation takes z = [gate | up] and returns act(gate) * up. SwiGLU has options, which are
part of its name: ``swiglu(alpha=1.702, limit=7.0, offset=1.0)``, see `SwigluOptions`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenyard.errors import ConfigError, one_of


class SwigluOptions(NamedTuple):
    """The options of SwiGLU: a = (u + offset) * g * sigmoid(alpha * g).

    g is min(gate, limit), and u is `up` clamped to [-limit, limit]. The defaults are plain SwiGLU.
    DeepSeek-V4 sets a limit. GPT-OSS has alpha 1.702, limit 7 and offset 1 (arXiv 2508.10925).
    """

    alpha: float = 1.0
    limit: float = math.inf
    offset: float = 0.0


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
"""Names of all activations, without options. An expert kernel must support them."""


def swiglu(alpha: float = 1.0, limit: float = math.inf, offset: float = 0.0) -> str:
    """Return the name of SwiGLU with these options, see `SwigluOptions`."""
    options = SwigluOptions(float(alpha), float(limit), float(offset))
    changed = [
        f"{key}={value}"
        for key, value in options._asdict().items()
        if value != SwigluOptions._field_defaults[key]
    ]
    return f"swiglu({', '.join(changed)})" if changed else "swiglu"


def swiglu_options(activation: str) -> SwigluOptions:
    """Return the options in a name of SwiGLU. Raises ConfigError if they cannot be used."""
    options = SwigluOptions()
    for option in filter(None, activation.partition("(")[2].removesuffix(")").split(",")):
        key, _, text = option.strip().partition("=")
        one_of(f"activation {activation!r}: option", key, SwigluOptions._fields)
        value = _number(text, activation)
        if key != "offset" and not value > 0:
            raise ConfigError(f"activation {activation!r}: {key} must be above 0")
        options = options._replace(**{key: value})
    return options


def _number(text: str, activation: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(
            f"activation {activation!r}: {text!r} is not a number; "
            "write options as in swiglu(alpha=1.702, limit=7.0, offset=1.0)"
        ) from None


def check_activation(activation: str) -> None:
    """Raise ConfigError for a name that is not an activation, with its options."""
    name, parenthesis, _ = activation.partition("(")
    one_of("activation", name, ACTIVATIONS)
    if name == "swiglu":
        swiglu_options(activation)
    elif parenthesis:
        raise ConfigError(f"activation {activation!r}: {name} has no options; swiglu has some")


def is_gated(activation: str) -> bool:
    """Return True if the up projection has 2F rows, gate rows first."""
    return activation.partition("(")[0] in GATED


def up_rows(activation: str, ffn_dim: int) -> int:
    """Return the number of rows of one expert's up projection: 2F if gated, else F."""
    return 2 * ffn_dim if is_gated(activation) else ffn_dim


def activate(z: Tensor, activation: str) -> Tensor:
    """Return the activation a [..., F] of the pre-activation z [..., 2F] or [..., F]."""
    if not is_gated(activation):
        return POINTWISE[activation](z)
    gate, up = z.chunk(2, dim=-1)
    if activation in GATED:
        return GATED[activation](gate) * up
    alpha, limit, offset = swiglu_options(activation)
    gate = gate.clamp(max=limit)
    return (up.clamp(-limit, limit) + offset) * (gate * torch.sigmoid(alpha * gate))


def activate_with_pullback(z: Tensor, activation: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return ``activate(z)`` and a function that maps its gradient da [..., F] to dz.

    The function does not use autograd.
    """
    if not is_gated(activation):
        return POINTWISE[activation](z), lambda da: _pointwise_backward(da, z, activation)
    if activation not in GATED:
        return _swiglu_with_pullback(z, swiglu_options(activation))
    gate, up = z.chunk(2, dim=-1)
    gate_act = GATED[activation](gate)

    def pullback(da: Tensor) -> Tensor:
        dz = torch.empty_like(z)
        dgate, dup = dz.chunk(2, dim=-1)  # views, so both halves are written into dz
        _GATE_BACKWARD[activation](da * up, gate, grad_input=dgate)
        torch.mul(da, gate_act, out=dup)
        return dz

    return gate_act * up, pullback


def _swiglu_with_pullback(
    z: Tensor, options: SwigluOptions
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    alpha, limit, offset = options
    gate, up = z.chunk(2, dim=-1)
    clamped = gate.clamp(max=limit)
    factor = up.clamp(-limit, limit) + offset
    sigmoid = torch.sigmoid(alpha * clamped)

    def pullback(da: Tensor) -> Tensor:
        dz = torch.empty_like(z)
        dgate, dup = dz.chunk(2, dim=-1)
        slope = sigmoid * (1 + alpha * clamped * (1 - sigmoid))
        zero = da.new_zeros(())
        torch.where(gate <= limit, da * factor * slope, zero, out=dgate)
        torch.where(up.abs() <= limit, da * clamped * sigmoid, zero, out=dup)
        return dz

    return factor * (clamped * sigmoid), pullback


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
