"""Our expert kernels inside transformers' models, by its own door for implementations of experts.

`use_in_transformers` opens it; then ``from_pretrained(..., experts_implementation="tokenyard")`` computes experts by
the best backend that is usable. The parameters stay transformers', so training, saving and generating are too.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from tokenyard import ConfigError, Workload, default_registry
from tokenyard.interfaces import ExpertKernel, ExpertWeights, Permutation
from tokenyard.numerics import compute_dtype

NAME = "tokenyard"
_DBRX = "TokenyardDbrxExperts"
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
"""Core's name of an activation by the class of transformers' `act_fn`."""
_GATED = {"silu": "swiglu", "gelu": "geglu", "relu": "reglu"}

log = logging.getLogger("tokenyard")


def use_in_transformers() -> None:
    """Offer ``experts_implementation="tokenyard"``, and give DBRX, which has no such choice, our experts.

    What is built or loaded by transformers in this process from now on can use it; a model whose experts compute
    something that core has no name for goes on by itself, and says so once. Raises ConfigError where transformers is
    not installed or is older than 5.14.
    """
    try:
        from transformers.integrations.moe import ExpertsInterface
        from transformers.models.dbrx import modeling_dbrx
    except ImportError as error:
        raise ConfigError(
            f'transformers 5.14 or later is needed ({error}); pip install "transformers>=5.14"'
        ) from None
    ExpertsInterface.register(NAME, compute_experts)
    theirs = modeling_dbrx.DbrxExperts
    if (
        theirs.__name__ != _DBRX
    ):  # transformers' own way to exchange a class imports all of its models
        modeling_dbrx.DbrxExperts = type(_DBRX, (theirs,), {"forward": _dbrx})


def compute_experts(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Return y [T, D] of tokens [T, D] by the experts that `module` holds; an id past the last one is nobody's."""
    reason = _unusual(module)
    if reason is not None:
        _say_once(type(module).__name__, reason)
        own: Tensor = type(module).forward.__wrapped__(
            module, hidden_states, top_k_index, top_k_weights
        )
        return own
    up = module.gate_up_proj if module.has_gate else module.up_proj
    weights = [up, module.down_proj]
    if getattr(module, "is_transposed", False):
        weights = [weight.transpose(1, 2) for weight in weights]
    biases: list[Tensor | None] = [None, None]
    if getattr(module, "has_bias", False):
        biases = [
            module.gate_up_proj_bias if module.has_gate else module.up_proj_bias,
            module.down_proj_bias,
        ]
    return _compute(
        ExpertWeights(*weights, *biases),
        _activation(module),
        hidden_states,
        top_k_index,
        top_k_weights,
    )


def _dbrx(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute DBRX's experts, whose three matrices of all experts stand one below the other."""
    shape = (module.num_experts, module.ffn_hidden_size, module.hidden_size)
    w1, v1, w2 = (getattr(module.mlp, name).view(shape) for name in ("w1", "v1", "w2"))
    x = hidden_states.reshape(-1, module.hidden_size)
    weights = ExpertWeights(torch.cat((w1, v1), 1), w2.transpose(1, 2))
    name = type(module.mlp.activation_fn).__name__
    activation = _GATED.get(_ACTIVATIONS.get(name, ""))
    if activation is None:
        _say_once(_DBRX, f"its activation is {name}")
        own: Tensor = super(type(module), module).forward(hidden_states, top_k_index, top_k_weights)
        return own
    y = _compute(weights, activation, x, top_k_index, top_k_weights)
    return y.view(hidden_states.shape[0], -1, module.hidden_size)


def _compute(
    weights: ExpertWeights, activation: str, x: Tensor, ids: Tensor, topk_weights: Tensor
) -> Tensor:
    experts, dim, ffn_dim = weights.down.shape
    bias = weights.up_bias is not None
    dtype = compute_dtype(weights.up)  # autocast's, which transformers' eager experts follow too
    permutation, kernel = _chosen(
        Workload(
            dim, ffn_dim, experts, ids.shape[1], activation, bias=bias, dtype=dtype, device=x.device
        )
    )
    plan = permutation.plan(ids.to(torch.int32), experts)
    wide = topk_weights.to(torch.promote_types(dtype, torch.float32))
    up_bias, down_bias = (
        None if b is None else b.to(dtype) for b in (weights.up_bias, weights.down_bias)
    )
    narrow = ExpertWeights(weights.up.to(dtype), weights.down.to(dtype), up_bias, down_bias)
    return kernel(x.to(dtype), plan, wide, narrow).to(x.dtype)


@functools.lru_cache(maxsize=64)
def _chosen(workload: Workload) -> tuple[Permutation, ExpertKernel]:
    registry = default_registry()
    permutation = registry.choose("permutation", "auto", workload).construct(workload)
    return permutation, registry.choose("experts", "auto", workload).construct(
        workload, permutation
    )


def _unusual(module: Any) -> str | None:
    """Say why our kernels do not compute what a module of experts does; None if they do."""
    from transformers.integrations import moe

    if type(module)._apply_gate is not moe._default_apply_gate:
        return "it combines gate and up in a way of its own"
    if getattr(module, "has_post_expert_norm", False):
        return "it normalises what an expert gives"
    if not getattr(module, "is_concatenated", True):
        return "its gate and up stand in turns"
    if _activation(module) is None:
        return f"its activation is {type(module.act_fn).__name__}"
    if not module.down_proj.is_floating_point() or module.down_proj.itemsize < 2:
        return f"its weights are {module.down_proj.dtype}"
    return None


def _activation(module: Any) -> Any:
    name = _ACTIVATIONS.get(type(module.act_fn).__name__)
    return _GATED.get(name or "") if module.has_gate else name


@functools.cache
def _say_once(name: str, reason: str) -> None:
    log.warning("%s is computed by transformers' own eager implementation: %s", name, reason)
