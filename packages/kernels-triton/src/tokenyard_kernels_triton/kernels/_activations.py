"""The activation functions and their derivatives, on float32 tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenyard.activations import swiglu_options

_FUNCTIONS = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}


def function_of(activation: str) -> tuple[str | float, ...]:
    """Return what kernels take as FUNCTION: a function, and the options of SwiGLU if it has any.

    A gated activation applies the function to its gate; any other has a function of its own name.
    SwiGLU with options is ("silu", alpha, limit, offset), see core's `SwigluOptions`.
    """
    name = activation.partition("(")[0]
    options = swiglu_options(activation) if name != activation else ()
    return (_FUNCTIONS.get(name, name), *options)


@triton.jit
def function(z, FUNCTION: tl.constexpr, PTX: tl.constexpr = False):
    """Return f(z). PTX says that the kernel runs on NVIDIA GPUs only, where it is faster."""
    if len(FUNCTION) > 1:
        g = tl.minimum(z, FUNCTION[2], tl.PropagateNan.ALL)
        return g * _logistic(FUNCTION[1] * g, False)  # with PTX, matmuls spill registers
    elif FUNCTION[0] == "silu":
        return z * _logistic(z, PTX)
    elif FUNCTION[0] == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))  # sqrt(1 / 2)
    elif FUNCTION[0] == "gelu_tanh":
        # (1 + tanh(u)) / 2 = logistic(2u), and 2 * sqrt(2 / pi) = 1.5957...
        return z * _logistic(1.5957691216057308 * (z + 0.044715 * z * z * z), PTX)
    elif FUNCTION[0] == "relu":
        return tl.maximum(z, 0.0)
    else:
        tl.static_assert(FUNCTION[0] == "relu_squared")
        positive = tl.maximum(z, 0.0)
        return positive * positive


@triton.jit
def function_and_slope(z, FUNCTION: tl.constexpr, PTX: tl.constexpr = False):
    """Return f(z) and f'(z); the slope of relu at 0 is 0. `function` describes PTX."""
    if len(FUNCTION) > 1:
        g = tl.minimum(z, FUNCTION[2], tl.PropagateNan.ALL)
        s = _logistic(FUNCTION[1] * g, False)
        slope = s + FUNCTION[1] * g * s * (1.0 - s)
        return g * s, tl.where(z <= FUNCTION[2], slope, 0.0)
    elif FUNCTION[0] == "silu":
        s = _logistic(z, PTX)
        return z * s, s + z * s * (1.0 - s)
    elif FUNCTION[0] == "gelu":
        below = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))  # the normal distribution's CDF
        return z * below, below + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)  # sqrt(1 / 2 pi)
    elif FUNCTION[0] == "gelu_tanh":
        s = _logistic(1.5957691216057308 * (z + 0.044715 * z * z * z), PTX)
        return z * s, s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif FUNCTION[0] == "relu":
        return tl.maximum(z, 0.0), tl.where(z > 0.0, 1.0, 0.0)
    else:
        tl.static_assert(FUNCTION[0] == "relu_squared")
        positive = tl.maximum(z, 0.0)
        return positive * positive, 2.0 * positive


@triton.jit
def factor(up, FUNCTION: tl.constexpr):
    """Return what the function of the gate is multiplied by: `up`, clamped and shifted."""
    if len(FUNCTION) > 1:
        up = tl.clamp(up, -FUNCTION[2], FUNCTION[2], tl.PropagateNan.ALL) + FUNCTION[3]
    return up


@triton.jit
def through_clamp(gradient, up, FUNCTION: tl.constexpr):
    """Return the gradient of `up`, given that of its factor."""
    if len(FUNCTION) > 1:
        gradient = tl.where(tl.abs(up) <= FUNCTION[2], gradient, 0.0)
    return gradient


@triton.jit
def _logistic(z, PTX: tl.constexpr):
    if PTX:
        # Without the branches for subnormal numbers of tl.exp and of a division: about 1 ulp more.
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 power;
            ex2.approx.ftz.f32 power, $1;
            add.ftz.f32 power, power, 0f3F800000;
            rcp.approx.ftz.f32 $0, power;
            }""",
            "=f,f",
            [z * -1.4426950408889634],  # log2(e)
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return 1.0 / (1.0 + tl.exp(-z))
