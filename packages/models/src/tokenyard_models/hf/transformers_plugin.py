"""Use tokenyard's expert kernels in transformers' models.

`use_in_transformers` registers them in transformers' interface for experts. Then
``from_pretrained(..., experts_implementation="tokenyard")`` computes experts with the best usable
backend. The parameters remain transformers', so training, saving and generating do too.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenyard import ConfigError, Workload, default_registry
from tokenyard.dtypes import compute_dtype
from tokenyard.interfaces import ExpertKernel, ExpertWeights, Permutation
from tokenyard_models.hf._experts_module import (
    activation,
    function_name,
    gated,
    own_swiglu,
    unsupported,
    weights,
)

NAME = "tokenyard"
_DBRX = "TokenyardDbrxExperts"
_FALLBACK = "grouped_mm"  # what transformers takes if no implementation is named

log = logging.getLogger("tokenyard")


def use_in_transformers() -> None:
    """Register ``experts_implementation="tokenyard"``, and replace the class of DBRX's experts.

    DBRX has no `experts_implementation`. Affects models that transformers builds or loads after
    this call. A model whose experts core cannot compute falls back to transformers' own default and
    logs one warning. ``torch.compile(fullgraph=True)`` captures both in one graph. A model in which
    transformers lets no implementation be chosen computes as before and logs one warning, too.
    Raises ConfigError if transformers is not installed or older than 5.14.
    """
    try:
        from transformers import PreTrainedModel
        from transformers.integrations.moe import ExpertsInterface
        from transformers.models.dbrx import modeling_dbrx
    except ImportError as error:
        raise ConfigError(
            f'transformers 5.14 or later is needed ({error}); pip install "transformers>=5.14"'
        ) from None
    ExpertsInterface.register(NAME, compute_experts)
    # The compiler calls these instead of reading their code, which chooses backends and logs.
    torch.compiler.allow_in_graph(_compute)
    torch.compiler.assume_constant_result(_warn_once)
    torch.compiler.assume_constant_result(own_swiglu)
    # Not by transformers' own API to replace a class: that one imports all of its models.
    modeling_dbrx.DbrxExperts = _dbrx_class()
    choose = PreTrainedModel.get_correct_experts_implementation
    if not hasattr(choose, "__wrapped__"):
        PreTrainedModel.get_correct_experts_implementation = _with_warning(choose)


def __getattr__(name: str) -> Any:
    """Return the class of DBRX's experts, which pickles name as a member of this module."""
    if name == _DBRX:
        return _dbrx_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _dbrx_class() -> type:
    from transformers.models.dbrx import modeling_dbrx

    body = {"forward": _dbrx_forward, "__module__": __name__}
    return type(_DBRX, (modeling_dbrx.DbrxExperts,), body)


def compute_experts(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Return y [T, D] of tokens [T, D] by the experts of `module`.

    An id at or past the number of experts is dropped.
    """
    name = activation(module)
    reason = unsupported(module, name)
    if name is None or reason is not None:
        _warn_once(type(module).__name__, str(reason))
        theirs: Tensor = _fallback()(module, hidden_states, top_k_index, top_k_weights)
        return theirs
    return _compute(name, hidden_states, top_k_index, top_k_weights, *weights(module))


def _dbrx_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute DBRX's experts. Each of its three matrices holds all experts, [E F, D]."""
    act_fn = module.mlp.activation_fn
    name = gated(function_name(act_fn))
    if name is None:
        _warn_once(_DBRX, f"its activation is {type(act_fn).__name__}", "code")
        eager: Tensor = super(type(module), module).forward(
            hidden_states, top_k_index, top_k_weights
        )
        return eager
    shape = (module.num_experts, module.ffn_hidden_size, module.hidden_size)
    w1, v1, w2 = (getattr(module.mlp, key).view(shape) for key in ("w1", "v1", "w2"))
    x = hidden_states.reshape(-1, module.hidden_size)
    up = torch.cat((w1, v1), 1)
    y = _compute(name, x, top_k_index, top_k_weights, up, w2.transpose(1, 2))
    return y.view(hidden_states.shape[0], -1, module.hidden_size)


def _compute(
    activation_name: str,
    x: Tensor,
    ids: Tensor,
    topk_weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """Return y [T, D] of x [T, D]. Follows autocast, as transformers' eager experts do."""
    experts, dim, ffn_dim = down.shape
    dtype = compute_dtype(up)
    workload = Workload(
        dim,
        ffn_dim,
        experts,
        ids.shape[1],
        activation_name,
        bias=up_bias is not None,
        dtype=dtype,
        device=x.device,
    )
    permutation, kernel = _backends(workload)
    plan = permutation.plan(ids.to(torch.int32), experts)
    wide = topk_weights.to(torch.promote_types(dtype, torch.float32))
    biases = [None if b is None else b.to(dtype) for b in (up_bias, down_bias)]
    narrow = ExpertWeights(up.to(dtype), down.to(dtype), *biases)
    return kernel(x.to(dtype), plan, wide, narrow).to(x.dtype)


@functools.lru_cache(maxsize=64)
def _backends(workload: Workload) -> tuple[Permutation, ExpertKernel]:
    registry = default_registry()
    permutation = registry.choose("permutation", "auto", workload).construct(workload)
    kernel = registry.choose("experts", "auto", workload).construct(workload, permutation)
    return permutation, kernel


def _with_warning(choose: Callable[[Any, str | None], str]) -> Callable[[Any, str | None], str]:
    """Wrap the method by which a model takes an implementation: warn if it has no use for ours."""

    @functools.wraps(choose)
    def chosen(model: Any, requested: str | None) -> str:
        cls: Any = type(model)
        if requested == NAME and _counts_experts(cls):
            _warn_once(
                cls.__name__,
                "transformers lets no implementation of its experts be chosen",
                "code",
                once_for=cls.__module__,
            )
        return choose(model, requested)

    return chosen


@functools.cache
def _counts_experts(model: Any) -> bool:
    """Whether a model has experts that take no `experts_implementation`, by its source."""
    from transformers.models.dbrx import modeling_dbrx

    module = sys.modules.get(model.__module__)
    if module is None or module is modeling_dbrx or model._can_set_experts_implementation():
        return False
    try:
        code = inspect.getsource(module)
    except (OSError, TypeError):
        return False
    return re.search(r"config\.\w*experts\b", code) is not None


def _fallback() -> Callable[..., Tensor]:
    """Return transformers' default implementation of experts."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    implementation: Callable[..., Tensor] = ALL_EXPERTS_FUNCTIONS[_FALLBACK]
    return implementation


_warned: set[str] = set()
"""What the log names already: classes of experts, and modules without a choice."""


def _warn_once(
    name: str, reason: str, implementation: str = _FALLBACK, once_for: str | None = None
) -> bool:
    """Log once for each class, or for what `once_for` names. Returns whether this call did."""
    once_for = once_for or name
    if once_for in _warned:
        return False
    _warned.add(once_for)
    log.warning("%s is computed by transformers' own %s: %s", name, implementation, reason)
    return True
