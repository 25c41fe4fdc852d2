"""What a module of experts in transformers computes: its activation and its weights.

transformers' `use_experts_implementation` marks such modules, and says how they hold their weights.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenyard import activate, swiglu
from tokenyard.tolerance import relative_error

_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu_squared",
}
"""Core's name of an activation, by the class of transformers' `act_fn`."""
_GATED = {"silu": "swiglu", "gelu": "geglu", "relu": "reglu"}
_LIMITS = ("limit", "swiglu_limit")
_ALPHAS = ("alpha", "swiglu_alpha")
_SAME = 1e-6  # relative error: some classes compute in float32


def unsupported(module: Any, name: str | None) -> str | None:
    """Return why core cannot compute a module of experts, or None if it can.

    `name` is that of its activation.
    """
    if getattr(module, "has_post_expert_norm", False):
        return "it normalises what an expert gives"
    if name is None:
        if _has_own_gate(module):
            return "it combines gate and up in a way of its own"
        return f"its activation is {type(module.act_fn).__name__}"
    if not module.down_proj.is_floating_point() or module.down_proj.itemsize < 2:
        return f"its weights are {module.down_proj.dtype}"
    return None


def activation(module: Any) -> str | None:
    """Return core's name of a module's activation, or None if core has none."""
    if _has_own_gate(module):
        if function_name(getattr(module, "act_fn", F.silu)) != "silu":
            return None
        return own_swiglu(type(module), _first(module, _ALPHAS), _first(module, _LIMITS))
    name = function_name(module.act_fn)
    return _GATED.get(name or "") if module.has_gate else name


def function_name(act_fn: Any) -> str | None:
    """Return core's name of the function of an `act_fn`, or None if core has none."""
    if act_fn is F.silu:  # of LFM2
        return "silu"
    return _ACTIVATIONS.get(type(act_fn).__name__)


def gated(function: str | None) -> str | None:
    """Return core's gated activation that applies a function to its gate, or None."""
    return _GATED.get(function or "")


def weights(module: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return up [E, 2F or F, D], down [E, D, F] and their biases; gate rows first."""
    up = module.gate_up_proj if module.has_gate else module.up_proj
    down = module.down_proj
    if getattr(module, "is_transposed", False):
        up = up.transpose(1, 2)
        down = down.transpose(1, 2)
    up_bias = None
    down_bias = None
    if getattr(module, "has_bias", False):
        up_bias = module.gate_up_proj_bias if module.has_gate else module.up_proj_bias
        down_bias = module.down_proj_bias
    if _interleaved(module):
        up = _gate_first(up)
        up_bias = None if up_bias is None else _gate_first(up_bias)
    return up, down, up_bias, down_bias


def _gate_first(rows: Tensor) -> Tensor:
    """Return rows [E, 2F, ...], whose gate and up take turns, with all gate rows first."""
    return torch.cat((rows[:, ::2], rows[:, 1::2]), 1)


def _interleaved(module: Any) -> bool:
    return module.has_gate and not getattr(module, "is_concatenated", True)


def _has_own_gate(module: Any) -> bool:
    # Not `import moe`: transformers.integrations is a lazy module, which breaks torch 2.11's graphs
    from transformers.integrations.moe import _default_apply_gate

    return module.has_gate and type(module)._apply_gate is not _default_apply_gate


def _first(module: Any, names: tuple[str, ...]) -> float | None:
    values = (getattr(module, name, None) for name in names)
    return next((float(value) for value in values if value is not None), None)


def own_swiglu(cls: Any, alpha: float | None, limit: float | None) -> str | None:
    """Return the SwiGLU that a class's `_apply_gate` equals on a probe, or None.

    The compiler calls this instead of reading its code.
    """
    return _probe(cls, alpha, limit)


@functools.cache
def _probe(cls: Any, alpha: float | None, limit: float | None) -> str | None:
    """Compare a class's `_apply_gate` with SwiGLU beyond the limit, in all four quadrants."""
    options = {} if limit is None else {"limit": limit}
    candidates = [swiglu(**options), swiglu(alpha=alpha or 1.0, offset=1.0, **options)]
    points = torch.linspace(-3, 3, 61, dtype=torch.float64) * (limit or 1.0)
    z = torch.cartesian_prod(points, points)  # [n, 2]: gate and up, in turns or not
    module = SimpleNamespace(act_fn=F.silu)
    for names, value in ((_ALPHAS, alpha), (_LIMITS, limit)):
        vars(module).update(dict.fromkeys(names, value))
    try:
        own = cls._apply_gate(module, z)
    except (AttributeError, TypeError):  # it uses something else of its module
        return None
    return next((c for c in candidates if relative_error(own, activate(z, c)) < _SAME), None)
