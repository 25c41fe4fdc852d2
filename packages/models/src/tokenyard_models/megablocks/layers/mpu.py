"""Which parameters are of one rank's experts alone: a script must not reduce these like others."""

from __future__ import annotations

from torch import Tensor

from tokenyard_models.megablocks.layers import common
from tokenyard_models.megablocks.layers.arguments import Arguments


def set_expert_model_parallel_attributes(tensor: Tensor, is_parallel: bool) -> None:
    """Mark a parameter of experts, and say whether ranks share the experts."""
    tensor.expert_model_parallel = is_parallel  # type: ignore[attr-defined]


def is_moe_param(tensor: Tensor) -> bool:
    """Return whether a parameter is one of experts."""
    return hasattr(tensor, "expert_model_parallel")


def param_is_expert_model_parallel(param: Tensor) -> bool:
    """Return whether a parameter holds experts of this rank alone."""
    return getattr(param, "expert_model_parallel", False)


def get_expert_parallel_rank(args: Arguments) -> int:
    """Return this rank's number among those that share the experts."""
    return common.expert_ranks(args)[0]


def get_expert_parallel_world_size(args: Arguments) -> int:
    """Return the number of ranks that share the experts."""
    return common.expert_ranks(args)[1]


def experts_per_rank(args: Arguments) -> int:
    """Return the number of experts on each rank."""
    return args.moe_num_experts // get_expert_parallel_world_size(args)
