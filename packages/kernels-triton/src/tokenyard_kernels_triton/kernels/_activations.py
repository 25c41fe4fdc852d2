"""The activation functions and their derivatives, on float32 tiles."""

from __future__ import annotations

import triton
import triton.language as tl

FUNCTIONS = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}
"""The function that each gated activation applies to its gate.

Any other activation applies the function of its own name.
"""


@triton.jit
def function(z, FUNCTION: tl.constexpr):
    """Return f(z)."""
    if FUNCTION == "silu":
        return z / (1.0 + tl.exp(-z))
    elif FUNCTION == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))  # sqrt(1 / 2)
    elif FUNCTION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = logistic(2u), and 2 * sqrt(2 / pi) = 1.5957...
        return z * _logistic(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif FUNCTION == "relu":
        return tl.maximum(z, 0.0)
    else:
        tl.static_assert(FUNCTION == "relu_squared")
        positive = tl.maximum(z, 0.0)
        return positive * positive


@triton.jit
def function_and_slope(z, FUNCTION: tl.constexpr):
    """Return f(z) and f'(z); the slope of relu at 0 is 0."""
    if FUNCTION == "silu":
        s = _logistic(z)
        return z * s, s + z * s * (1.0 - s)
    elif FUNCTION == "gelu":
        below = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))  # the normal distribution's CDF
        return z * below, below + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)  # sqrt(1 / 2 pi)
    elif FUNCTION == "gelu_tanh":
        s = _logistic(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return z * s, s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif FUNCTION == "relu":
        return tl.maximum(z, 0.0), tl.where(z > 0.0, 1.0, 0.0)
    else:
        tl.static_assert(FUNCTION == "relu_squared")
        positive = tl.maximum(z, 0.0)
        return positive * positive, 2.0 * positive


@triton.jit
def _logistic(z):
    return 1.0 / (1.0 + tl.exp(-z))
